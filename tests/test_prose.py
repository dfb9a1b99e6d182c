"""Plain English: few words, short sentences, the field's terms, and zeros before decimal points."""

import ast
import re
import tokenize

import pytest
from conftest import CODE, ROOT

PAGES = ["README.md", *sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/*.md"))]
MOST_WORDS = {
    "README.md": 900,
    "docs/masks.md": 1300,
    "docs/data.md": 1300,
    "docs/recognise.md": 1100,
    "docs/results.md": 1300,
    "docs/checkpoints.md": 700,
    "docs/hybrid.md": 600,
    "docs/detect.md": 700,
    "docs/tags.md": 500,
    "docs/machines.md": 400,
    "docs/glossary.md": 300,
    "results/TRIED.md": 2000,
    "results/STUDY.md": 2000,
}
ALL_DOCS = 8000  # words of all pages of docs together
LONGEST, LONGEST_IN_CODE = 20, 35  # words of a sentence
RECORDS = ["results/README.md", "results/TRIED.md"]
DECIMAL = r"(?<![\w.)/:\]\"'=,<>+-])[-+]?\.\d+(?![\w%])"
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


def faults_of(text, longest, banned):
    """Sentences that are too long, decimals without a zero, and words that are not the field's."""
    found = [sentence for sentence in sentences_of(text) if len(words_of(sentence)) > longest]
    found += re.findall(DECIMAL, re.sub(r"`[^`]*`|^ {4}.*$|--\S+", "", text, flags=re.M))
    prose = " ".join(prose_of(text).lower().split())
    words = [word for word in banned if re.search(rf"\b(?:{word})\b", prose)]
    return found + [f"{word}: better {banned[word]}" for word in words]


# ---- pages ---------------------------------------------------------------------------------------


def test_pages_have_few_words():
    count = {name: len(words_of((ROOT / name).read_text())) for name in MOST_WORDS}
    assert not {name: words for name, words in count.items() if words > MOST_WORDS[name]}
    assert sum(count[name] for name in PAGES[1:]) <= ALL_DOCS


@pytest.mark.parametrize("name", [*PAGES, *RECORDS])
def test_a_page_is_plain(name):
    assert not faults_of((ROOT / name).read_text(), LONGEST, ON_PAGES)


# ---- docstrings, comments, help, messages --------------------------------------------------------

CODE = [path for path in CODE if path.parent.name != "tests"]


SPEAKERS = ("Error", "print", "error")


def docstrings_of(tree):
    """The paragraphs of docstrings, without what is indented or a list of two columns."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    text = "\n\n".join(found)
    return re.sub(r"^( {4}|\S+\??  ).*$|^ {2,}.*$", "", text, flags=re.M)


def comments_of(path):
    with open(path, "rb") as file:
        tokens = list(tokenize.tokenize(file.readline))
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    return [text.lstrip("# ") for text in comments if not re.search("noqa|^#!", text)]


def text_of(node):
    """A string or an f-string as text, with a word in the place of each value."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.FormattedValue):
        return "Value"
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def messages_of(tree):
    """The texts of --help, of errors and of what is printed."""
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "help":
            texts.append(text_of(node.value))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(SPEAKERS):
            texts += map(text_of, ast.walk(node))
    return [text for text in texts if " " in text]  # the others are names and formats


@pytest.mark.parametrize("path", CODE, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_what_code_says_is_plain(path):
    tree = ast.parse(path.read_text())
    texts = [docstrings_of(tree), *comments_of(path), *messages_of(tree)]
    faults = [faults_of(text, LONGEST_IN_CODE, BANNED) for text in texts]
    assert not [found for found in faults if found]
