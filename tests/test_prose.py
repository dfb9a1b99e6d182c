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
LONGEST, MEAN = 35, 18  # words of a sentence
# words of this project alone, or of history; the field's word stands behind each
BANNED = {
    "names rightly": "accuracy",
    "named rightly": "accuracy",
    "strangers": "unknown characters",
    "ends level": "no difference",
    "is level": "no difference",
    "looks at": "attends to",
    "look at what": "attend to",
    "to beat": "be better than",
    "what it makes of": "predict",
    "untrained encoder": "random-init encoder",
    "no word on": "say nothing about",
    "wants a": "use",
    "said beside": "printed",
    "mend": "fix",
    "since then": "leave history out",
    "not kept": "leave history out",
    "the aim of": "leave aims out",
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


@pytest.mark.parametrize("name", PAGES)
def test_sentences_are_short(name):
    sentences = sentences_of((ROOT / name).read_text())
    lengths = [len(words_of(sentence)) for sentence in sentences]
    assert not [s for s, n in zip(sentences, lengths, strict=True) if n > LONGEST]
    assert not lengths or sum(lengths) / len(lengths) <= MEAN


@pytest.mark.parametrize("name", PAGES)
def test_decimals_have_a_zero(name):
    text = re.sub(r"`[^`]*`|^ {4}.*$", "", (ROOT / name).read_text(), flags=re.M)
    assert not re.findall(r"(?<![\w.)/])[-+]?\.\d+", text)


@pytest.mark.parametrize("name", PAGES)
def test_the_words_are_the_fields(name):
    text = " ".join(prose_of((ROOT / name).read_text()).lower().split())
    assert not {word: better for word, better in BANNED.items() if re.search(rf"\b{word}\b", text)}


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
    found = [
        x.string for x in tokens if x.type == tokenize.COMMENT and not NOT_HERE.search(x.string)
    ]
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
    spoken = [
        node for node in calls if ast.unparse(node.func).endswith(("Error", "print", "error"))
    ]
    parts = itertools.chain.from_iterable(map(ast.walk, spoken))
    return [text_of(part) for part in parts if isinstance(part, (ast.JoinedStr, ast.Constant))]


@pytest.mark.parametrize("path", CODE, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_messages_are_plain(path):
    for text in messages_of(path):
        assert all(len(words_of(sentence)) <= LONGEST for sentence in sentences_of(text)), text
        assert not re.findall(r"(?<![\w.)/:\]\"'=,<>+-])[-+]?\.\d+ ", text), text
        words = " ".join(re.sub(r"\{[^}]*\}", "", text).lower().split())
        assert not {w: better for w, better in BANNED.items() if re.search(rf"\b{w}\b", words)}


@pytest.mark.parametrize("path", CODE, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_docstrings_and_comments_are_plain(path):
    docs, comments = docstrings_of(path), comments_of(path)
    sentences = sentences_of(docs)
    assert not [s for s in sentences if len(words_of(s)) > LONGEST]
    for text in (docs, comments):
        plain = re.sub(r"`[^`]*`|--\S+", "", text)
        assert not re.findall(r"(?<![\w.)/:\]\"'])[-+]?\.\d+", plain)
        words = " ".join(plain.lower().split())
        assert not {w: better for w, better in BANNED.items() if re.search(rf"\b{w}\b", words)}
