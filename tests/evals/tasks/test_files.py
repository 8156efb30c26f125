"""Records of every task, and error messages for invalid files with path and line."""

from __future__ import annotations

import codecs
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from restomod.evals.tasks import arc, hellaswag, lambada, piqa, winograd
from restomod.evals.tasks.files import read_examples
from restomod.evals.tasks.registry import own_example
from restomod.evals.tasks.task import Example, Record
from restomod.utils.errors import UserError

WIKIHOW = {
    "activity_label": "Home and Garden",
    "ctx_a": "[header] How to mow [title] Wait. [step] Mow  dry grass.",
    "ctx_b": "then mow",
    "ctx": "[header] How to mow [title] Wait. [step] Mow  dry grass. then mow",
    "endings": ["it [substeps] again.", "the  cat."],
    "label": "1",
}
ARC = {
    "question": "What is wet?",
    "choices": {"text": ["fire", "water", "air"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
WSC = {
    "text": "The trophy does not fit in the case because it is too big.",
    "pronoun": "it",
    "pronoun_loc": 44,
    "options": ["The trophy", "The case"],
    "label": 0,
}
GOOD = {"query": "One and one is", "choices": ["two", "three"], "gold": 0}


def texts(example: Example) -> list[tuple[str, str]]:
    return list(zip(example.contexts, example.continuations, strict=True))


def test_hellaswag_has_the_formats_of_build_nanogpt_and_of_the_harness() -> None:
    plain = hellaswag.plain_example(WIKIHOW)
    assert texts(plain) == [(WIKIHOW["ctx"], " it [substeps] again."), (WIKIHOW["ctx"], " the  cat.")]
    assert (plain.gold, plain.choices) == (1, ("it [substeps] again.", "the  cat."))
    # written manually from lm-evaluation-harness's tasks/hellaswag/utils.py
    context = "Home and Garden:  How to mow. Wait. Mow dry grass. Then mow".replace(":  ", ": ")
    assert texts(hellaswag.harness_example(WIKIHOW)) == [(context, " it again."), (context, " the cat.")]
    without_parts = {k: v for k, v in WIKIHOW.items() if k not in ("ctx_a", "ctx_b")}
    assert hellaswag.harness_example(without_parts).contexts[0].endswith("grass. then mow")


def test_arc_and_piqa_ask_a_question() -> None:
    example = arc.example(ARC)
    assert texts(example)[1] == ("Question: What is wet?\nAnswer:", " water")
    assert (example.gold, len(example.choices)) == (1, 3)
    example = piqa.example({"goal": "Open it", "sol1": "Push.", "sol2": "Wait.", "label": 1})
    assert texts(example) == [("Question: Open it\nAnswer:", " Push."), ("Question: Open it\nAnswer:", " Wait.")]
    assert example.gold == 1


def test_a_winograd_schema_scores_the_rest_after_each_candidate() -> None:
    before = "The trophy does not fit in the case because "
    assert texts(winograd.example(WSC)) == [
        (f"{before}the trophy", " is too big."),
        (f"{before}the case", " is too big."),
    ]
    his = {"text": "Joe paid Sam. His money was gone.", "pronoun": "His", "pronoun_loc": 14, "options": ["Joe", "Sam"]}
    example = winograd.example(his | {"label": 0})
    assert example.contexts == ("Joe paid Sam. Joe's", "Joe paid Sam. Sam's")
    started = {"text": "A saw B. It fell.", "pronoun": "It", "pronoun_loc": 9, "options": ["The A", "The B"]}
    assert winograd.example(started | {"label": 0}).contexts[0] == "A saw B. The A"


def test_lambada_asks_for_the_last_word() -> None:
    expected = [("I don't care about", " signs")]
    assert texts(lambada.example({"text": "I don't care about signs"})) == expected
    assert texts(lambada.example({"context": "I don't care about", "continuation": "signs"})) == expected
    assert texts(lambada.example({"context": "I don't care about", "continuation": " signs"})) == expected


def test_own_questions_may_have_either_field_names() -> None:
    assert own_example(GOOD) == own_example({"ctx": "One and one is", "endings": ["two", "three"], "label": 0})
    assert texts(own_example(GOOD)) == [("One and one is", " two"), ("One and one is", " three")]


def test_json_lines_and_parquet_give_the_same_examples(tmp_path: Path) -> None:
    other = GOOD | {"gold": 1}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(other)}\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD, other]), tmp_path / "a.parquet")
    lines, rows = (read_examples(tmp_path / name, own_example) for name in ("a.jsonl", "a.parquet"))
    assert [example.where for example in lines] == [f"{tmp_path}/a.jsonl, line {n}" for n in (1, 3)]
    assert [(texts(e), e.gold) for e in lines] == [(texts(e), e.gold) for e in rows]
    assert [example.gold for example in lines] == [0, 1]


@pytest.mark.parametrize(
    ("example", "record", "said"),
    [
        (own_example, GOOD | {"gold": 2}, "the right choice is 2, but the 2 choices are numbered 0 to 1"),
        (own_example, GOOD | {"gold": -1}, "the right choice is -1"),
        (own_example, GOOD | {"gold": "one"}, "'gold' should be the number of the right choice, not 'one'"),
        (own_example, GOOD | {"gold": None}, "'gold' should be an integer, not None"),
        (own_example, GOOD | {"gold": True}, "'gold' should be an integer, not True"),
        (own_example, GOOD | {"choices": ["two", ""]}, "choice 1 is empty; every choice needs text"),
        (own_example, GOOD | {"choices": ["two", " \n"]}, "choice 1 is empty"),
        (own_example, GOOD | {"choices": ["two"]}, "has 1 choices; a question needs two or more"),
        (own_example, GOOD | {"choices": "two"}, "'choices' should be a list, not 'two'"),
        (own_example, GOOD | {"choices": ["two", 3]}, "choice 1 should be text, not 3"),
        (own_example, GOOD | {"query": 3}, "'query' should be text, not 3"),
        (own_example, {"query": "a", "gold": 0}, "has no 'choices' or 'endings'; it has 'query', 'gold'"),
        (own_example, {}, "has no 'query' or 'ctx'; it has no fields"),
        (hellaswag.plain_example, GOOD, "has no 'ctx'; it has 'query', 'choices', 'gold'"),
        (arc.example, ARC | {"answerKey": "D"}, "the answer 'D' is not in the choices' labels ['A', 'B', 'C']"),
        (winograd.example, WSC | {"pronoun_loc": 3}, "the pronoun 'it' is not at character 3 of the text"),
        (winograd.example, WSC | {"options": ["the cat", ""]}, "choice 1 is empty"),
        (own_example, GOOD | {"gold": "9" * 4000}, f"the right choice is {'9' * 80}…, but"),
        (winograd.example, WSC | {"pronoun": "x" * 10**6}, f"the pronoun '{'x' * 79}… is not at"),
        (arc.example, ARC | {"answerKey": "D" * 10**6}, f"the answer '{'D' * 79}… is not in"),
        (lambada.example, {"text": "word"}, "has a single word"),
        (lambada.example, {"text": "two words "}, "choice 0 is empty"),
    ],
)
def test_a_wrong_record_is_named_by_file_and_line(
    example: Callable[[Record], Example], record: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"\n{json.dumps(record)}\n")
    with pytest.raises(UserError) as caught:
        read_examples(path, example)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert said in str(caught.value)


RECORD = b'{"query": "a", "choices": ["b", "c"], "gold": 0}\n'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"not JSON\n", ", line 1: not JSON (Expecting value"),
        (b"\xff\n", ", line 1: not JSON ("),
        (b"[1]\n", ", line 1: should be an object such as"),
        (b"\n\n", " is empty: it has no examples"),
        (b"[" * 100_000, ", line 1: not JSON ("),
        (RECORD + b"[" * 100_000, ", line 2: "),
        (RECORD + b'{"a":' * 100_000, ", line 2: "),
        (RECORD + b'{"gold": ' + b"9" * 5000 + b"}", ", line 2: "),
        (RECORD + b"\0" * 100, ", line 2: "),
        (RECORD + b"5", ", line 2: "),
        (RECORD + b'"x"', ", line 2: "),
    ],
)
def test_a_wrong_file_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_examples(path, own_example)
    assert str(caught.value).startswith(f"{path}{said}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a", "a.gz"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_the_content_determines_the_format(
    tmp_path: Path, name: str, compress: Callable[[bytes], bytes], mark: bytes
) -> None:
    other = GOOD | {"gold": 1}
    lines = b"\n".join(json.dumps(record).encode() for record in (GOOD, other))
    rows = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD, other]), rows)
    array = json.dumps([GOOD, other], indent=2).encode()
    for content in (mark + lines, mark + array, rows.getvalue()):
        (tmp_path / name).write_bytes(compress(content))
        assert [example.gold for example in read_examples(tmp_path / name, own_example)] == [0, 1]


def test_a_row_that_is_not_utf8_is_an_error_in_one_line(tmp_path: Path) -> None:
    raw = pyarrow.array([b"a", b"caf\xe9"], type=pyarrow.binary())
    text = pyarrow.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])
    pyarrow.parquet.write_table(pyarrow.table({"query": text}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet is damaged: .*utf-8"):
        read_examples(tmp_path / "a.parquet", own_example)


def test_a_missing_file_and_a_damaged_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl: no such file"):
        read_examples(tmp_path / "a.jsonl", own_example)
    with pytest.raises(UserError, match="is a folder; give the path of a file"):
        read_examples(tmp_path, own_example)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"a\.parquet is damaged: "):
        read_examples(tmp_path / "a.parquet", own_example)


def test_a_page_of_parquet_with_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"query": ["a question"], "choices": [["this", "that"]], "gold": [1]})
    as_is = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pyarrow.parquet.write_table(table, path, write_page_checksum=True, **as_is)
    assert read_examples(path, own_example)[0].contexts == ("a question",) * 2
    path.write_bytes(path.read_bytes().replace(b"a question", b"a quession", 1))
    with pytest.raises(UserError, match=r"a\.parquet is damaged: .*CRC"):
        read_examples(path, own_example)


def test_half_a_surrogate_pair_is_read_as_a_replacement_character(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"query": "a\\ud800", "choices": ["\\udfff", "b"], "gold": 0}\n')
    (example,) = read_examples(path, own_example)
    assert (example.contexts[0], example.choices) == ("a\ufffd", ("\ufffd", "b"))


@pytest.mark.parametrize("head", ['{"query":"', "", '{"query": "a", "choices": ["b", "c"], "gold": 0}\n'])
def test_a_giant_line_is_refused_without_reading_it_into_memory(tmp_path: Path, head: str) -> None:
    path = tmp_path / "a.jsonl"
    with gzip.open(path, "wb", compresslevel=1) as f:
        f.write(head.encode())
        for _ in range(100):
            f.write(b"a" * 2**20)
    with pytest.raises(UserError, match=r"a\.jsonl, line \d: .*(longer|not JSON)"):
        read_examples(path, own_example)


def test_too_many_examples_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("restomod.evals.tasks.files.MOST_EXAMPLES", 3)
    path = tmp_path / "a.jsonl"
    path.write_text('{"query": "a", "choices": ["b", "c"], "gold": 0}\n' * 3)
    assert len(read_examples(path, own_example)) == 3
    path.write_text(path.read_text() + path.read_text())
    with pytest.raises(UserError, match=r"line 4: .*at most 3 examples"):
        read_examples(path, own_example)
