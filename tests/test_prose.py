"""Plain English: few words, short sentences, the field's terms, and zeros before decimal points."""

import ast
import itertools
import re
import tokenize

import pytest
from conftest import CODE, ROOT

PAGES = ["README.md", *sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/*.md"))]
MOST_WORDS = {"README.md": 900, "results/TRIED.md": 2000, "results/STUDY.md": 2000}
OF_DOCS, ALL_DOCS = 1300, 8000  # words of one page of docs, and of all of them
LONGEST, LONGEST_IN_CODE = 20, 35  # words of a sentence
RECORDS = ["results/README.md", "results/TRIED.md"]
# words of this project alone, or of history; the field's word stands behind each
BANNED = {
    "named? rightly|names rightly": "accuracy",
    "strangers": "unknown characters",
    "ends level|is level": "no difference",
    "looks at|look at what": "attends to",
    "to beat": "be better than",
    "untrained encoder": "random-init encoder",
    "what it makes of|no word on": "predict, say nothing about",
    "wants a|mend": "use, fix",
    "since then|not kept|the aim of": "leave history and aims out",
}
ON_PAGES = BANNED | {  # code may use them
    "views?": "crop",
    r"(?<!scikit-)images?(?! size)": "picture",
    "untrained": "random-init encoder",
    "arms?": "mask, method",
    "full fine-tuning": "fine-tuning all weights",
    "held apart|rejected": "held-out, called unknown",
    "second loss|reconstruction error": "contrastive loss, masked error",
    "(?<!learning )rates?|(?<!standard )deviations?": "learning rate, standard deviation",
    "portions?|ground|beats?": "share, background, is better than",
    "beside|rightly": "next to or compared with, correctly",
}


def words_of(text):
    """The words of a page. What has no letter and no digit, such as the lines of a table, is none."""
    return [word for word in text.split() if re.search(r"\w", word)]


def prose_of(text):
    """A page without code, tables, headings, pictures and addresses: paragraphs and list items."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    text = re.sub(r"^( {4}|\|).*$", "", text, flags=re.M)
    text = re.sub(r"^#.*$|<[^>]+>|!\[[^\]]*\]\([^)]*\)", "", text, flags=re.M)
    text = re.sub(r"^Source: .*$", "", text, flags=re.M)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"`[^`]*`", "Code", text)


def sentences_of(text):
    """Each sentence of the prose. A blank line, a list item and a colon before a line end one."""
    found = []
    for block in re.split(r"\n\s*\n|\n(?=- |\d\. )", prose_of(text)):
        found += re.split(r"(?<=[.!?:])\s+(?=[A-Z])", " ".join(block.split()))
    return [sentence for sentence in found if words_of(sentence)]


@pytest.mark.parametrize("name", [*MOST_WORDS, *PAGES[1:]])
def test_a_page_has_few_words(name):
    assert len(words_of((ROOT / name).read_text())) <= MOST_WORDS.get(name, OF_DOCS)


def test_all_docs_together_have_few_words():
    assert sum(len(words_of((ROOT / name).read_text())) for name in PAGES[1:]) <= ALL_DOCS


@pytest.mark.parametrize("name", [*PAGES, *RECORDS])
def test_sentences_are_short(name):
    sentences = sentences_of((ROOT / name).read_text())
    assert not [s for s in sentences if len(words_of(s)) > LONGEST]


@pytest.mark.parametrize("name", PAGES)
def test_decimals_have_a_zero(name):
    text = re.sub(r"`[^`]*`|^ {4}.*$", "", (ROOT / name).read_text(), flags=re.M)
    assert not re.findall(r"(?<![\w.)/])[-+]?\.\d+", text)


def banned(text, words=BANNED):
    """The banned words of a text, each with the better one."""
    text = " ".join(text.lower().split())
    return {word: words[word] for word in words if re.search(rf"\b(?:{word})\b", text)}


@pytest.mark.parametrize("name", [*PAGES, *RECORDS])
def test_the_words_are_the_fields(name):
    assert not banned(prose_of((ROOT / name).read_text()), ON_PAGES)


# ---- docstrings, comments, help ------------------------------------------------------------------

CODE = [path for path in CODE if path.parent.name != "tests"]
NOT_HERE = re.compile(r"noqa|^ *#!")


def docstrings_of(path):
    """The paragraphs of a file's docstrings, without what is indented or a list of two columns."""
    tree = ast.parse(path.read_text())
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    text = "\n\n".join(found)
    return re.sub(r"^( {4}|\S+\??  ).*$|^ {2,}.*$", "", text, flags=re.M)


def comments_of(path):
    """The comments of a file, and the help of its flags."""
    with open(path, "rb") as file:
        tokens = list(tokenize.tokenize(file.readline))
    comments = [x.string for x in tokens if x.type == tokenize.COMMENT]
    found = [text for text in comments if not NOT_HERE.search(text)]
    calls = [x for x in ast.walk(ast.parse(path.read_text())) if isinstance(x, ast.keyword)]
    helps = [x.value.value for x in calls if x.arg == "help" and isinstance(x.value, ast.Constant)]
    return "\n\n".join([*found, *helps])


def text_of(node):
    """A string or an f-string as text, with a word in the place of each value."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.FormattedValue):
        return "Value"
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def messages_of(path):
    """The texts of errors and of what is printed, one paragraph each."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    spoken = [x for x in calls if ast.unparse(x.func).endswith(("Error", "print", "error"))]
    parts = itertools.chain.from_iterable(map(ast.walk, spoken))
    return [text_of(part) for part in parts if isinstance(part, (ast.JoinedStr, ast.Constant))]


@pytest.mark.parametrize("path", CODE, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_messages_are_plain(path):
    for text in messages_of(path):
        assert all(len(words_of(s)) <= LONGEST_IN_CODE for s in sentences_of(text)), text
        assert not re.findall(r"(?<![\w.)/:\]\"'=,<>+-])[-+]?\.\d+ ", text), text
        assert not banned(re.sub(r"\{[^}]*\}", "", text))


@pytest.mark.parametrize("path", CODE, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_docstrings_and_comments_are_plain(path):
    docs, comments = docstrings_of(path), comments_of(path)
    assert not [s for s in sentences_of(docs) if len(words_of(s)) > LONGEST_IN_CODE]
    for text in (docs, comments):
        plain = re.sub(r"`[^`]*`|--\S+", "", text)
        assert not re.findall(r"(?<![\w.)/:\]\"'])[-+]?\.\d+", plain)
        assert not banned(plain)
