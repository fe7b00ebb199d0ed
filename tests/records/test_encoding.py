"""Conversations as token ids: where a turn ends, what is too long, what is cached."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from dmax.chat_template import turn_ending
from dmax.errors import InputError
from dmax.records.encoding import encode_dataset, ending_ids
from dmax.special_ids import SpecialIds
from dmax.tiny.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
[EOS] = TOKENIZER.encode(TOKENIZER.eos_token, add_special_tokens=False)
[ROLE_END] = TOKENIZER.encode("<|role_end|>", add_special_tokens=False)
IDS = SpecialIds(TOKENIZER.mask_token_id, (EOS,), EOS, block_length=8)

LLADA = (
    "{% for message in messages %}<role>{{ message['role'] | upper }}</role>"
    "{{ message['content'] }}<|role_end|>{% endfor %}"
    "{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = (  # writes an empty thought before the last answer, and strips it
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n"
    "{%- if message.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n"
    "{{- message.content.split('</think>')[-1].strip('\n') }}"
    "{%- else %}{{ message.content }}{%- endif %}<|im_end|>\n{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{%- endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}"
    "<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
REWRITES = (
    "{% for message in messages %}[{{ message.role }}: {{ message.content | upper | reverse }}]!\n"
    "{% endfor %}"
)
NO_ENDING = "{% for message in messages %}{{ message.content }}{% endfor %}"
QUESTIONS_ONLY = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ message.content }}?"
    "{% endif %}{% endfor %}"
)
RAISES = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ raise_exception('no answers') }}{% endif %}{{ message.content }}{% endfor %}"
)


def with_template(template: str) -> Any:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "ending"),
    [
        (LLADA, "<|role_end|>"),
        (CHATML, "<|im_end|>\n"),
        (QWEN3, "<|im_end|>"),
        (LLAMA3, "<|eot_id|>"),
        (REWRITES, "]!\n"),
        (NO_ENDING, ""),
        (QUESTIONS_ONLY, ""),
        (RAISES, ""),
    ],
)
def test_the_ending_of_a_turn_is_read_off_the_template(template: str, ending: str) -> None:
    assert turn_ending(with_template(template)) == ending


def test_the_bundled_template_ends_a_turn_as_published() -> None:
    assert ending_ids(TOKENIZER, [EOS]) == (ROLE_END,)
    assert turn_ending(TOKENIZER) == "<|role_end|>"


def test_an_ending_stops_at_the_eos_that_is_learnt_anyway() -> None:
    template = LLADA.replace("<|role_end|>", "<|role_end|>" + TOKENIZER.eos_token + "\n")
    tokenizer = with_template(template)
    assert ending_ids(tokenizer, [EOS]) == (ROLE_END,)
    assert ending_ids(tokenizer, [ROLE_END, EOS]) == ()  # as ChatML, whose end of turn is EOS
    assert ending_ids(tokenizer, [EOS, ROLE_END]) == (ROLE_END,)  # as Llama 3: either one ends


def encode(data: Any, **options: Any) -> Any:
    return encode_dataset(data, TOKENIZER, IDS, **{"max_length": 200} | options)


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def record(response: str = "He has 3.", prompt: str = "Tom has 3 apples.") -> dict[str, str]:
    return {"prompt": prompt, "response": response}


def test_an_example_is_the_prompt_as_the_template_has_it_and_the_response_with_its_ending() -> None:
    [example] = encode([record()])
    prompt = [{"role": "user", "content": "Tom has 3 apples."}]
    text = TOKENIZER.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert example["prompt_ids"] == ids_of(text)
    assert example["response_ids"] == [*ids_of("He has 3."), ROLE_END]
    assert (example["is_cut"], example["where"]) == (False, "the data, row 1")
    [example] = encode([record()], end_turn=False)
    assert example["response_ids"] == ids_of("He has 3.")


def test_what_is_distilled_gets_its_ending_back() -> None:
    """A response is decoded to a text without special tokens; its target has them again."""
    target = [*ids_of("He has 3."), ROLE_END, *[EOS] * 8]
    distilled = TOKENIZER.decode(target, skip_special_tokens=True)
    assert distilled == "He has 3."
    [example] = encode([record(distilled)])
    assert [*example["response_ids"], *[EOS] * 8] == target


WHOLE = len(encode([record()])[0]["prompt_ids"]) + len(ids_of("He has 3.")) + 1 + 8
"""Ids of the example above, with its ending and one block of EOS."""


def test_an_example_that_just_fits_is_whole_and_one_more_is_too_long() -> None:
    for too_long in ("error", "truncate", "skip"):
        assert encode([record()], max_length=WHOLE, too_long=too_long) == encode([record()])
    with pytest.raises(
        InputError,
        match=rf"the data, row 1: \d+ prompt and \d+ .* room for 8 EOS in .* {WHOLE - 1}",
    ):
        encode([record()], max_length=WHOLE - 1)
    assert encode([record()], max_length=WHOLE - 8, eos_labels=0) == encode([record()])


@pytest.mark.parametrize("missing", [1, 8, 9, 12])
def test_truncate_cuts_the_ids_as_the_published_code_does(missing: int) -> None:
    told: list[str] = []
    [whole] = encode([record()])
    ids = [*whole["prompt_ids"], *whole["response_ids"], *[EOS] * 8]
    [example] = encode(
        [record()], max_length=WHOLE - missing, too_long="truncate", report=told.append
    )
    assert [*example["prompt_ids"], *example["response_ids"]] == ids[:-missing]
    assert example["is_cut"] is True
    assert told == [f"cut 1 of 1 examples after {WHOLE - missing} tokens"]


def test_skip_and_truncate_count_what_they_leave_out() -> None:
    long = record(prompt="3 " * 100)
    longer = record(prompt="apples " * 50_000)  # is not even tokenized
    told: list[str] = []
    for too_long in ("skip", "truncate"):
        data = [record(), long, longer]
        kept = encode(data, max_length=WHOLE, too_long=too_long, report=told.append)
        assert kept == encode([record()])
    assert told == [f"left out 2 of 3 examples, longer than {WHOLE} tokens"] * 2
    with pytest.raises(InputError, match="no example to learn from: all of 1 are longer than 4"):
        encode([record()], max_length=4, too_long="skip")
    with pytest.raises(InputError, match="there is no example to learn from$"):
        encode([])
    with pytest.raises(InputError, match="`too_long` must be one of error, truncate, skip, got"):
        encode([record()], too_long="cut")


RECORDS = [record(f"He has {number}.", f"Tom has {number} apples.") for number in range(40)]
CHATS = [
    {
        "prompt": [{"role": "user", "content": each["prompt"]}],
        "completion": [{"role": "assistant", "content": each["response"]}],
    }
    for each in RECORDS
]


@pytest.mark.parametrize("rows", [RECORDS, CHATS])
@pytest.mark.parametrize("num_proc", [None, 2])
def test_a_table_and_a_stream_are_encoded_as_a_list_is(rows: list[Any], num_proc: int) -> None:
    datasets = pytest.importorskip("datasets")
    expected = [{**each, "where": ""} for each in encode(RECORDS)]
    table = datasets.Dataset.from_list(rows)
    encoded = encode(table, num_proc=num_proc)
    assert [{**each, "where": ""} for each in encoded] == expected
    assert [each["where"] for each in encoded] == [f"the data, row {n}" for n in range(1, 41)]
    stream = encode(table.to_iterable_dataset())
    assert [{**each, "where": ""} for each in stream] == expected
    for given in (encoded, stream, expected):
        assert encode(given) is given, "examples are given back as they are"


def test_a_table_is_encoded_once_for_a_tokenizer_and_its_rules(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    from dmax.records import encoding

    datasets.Dataset.from_list(RECORDS).save_to_disk(tmp_path)
    table = datasets.load_from_disk(tmp_path)
    calls = []
    encode_texts = encoding.encode_texts
    monkeypatch.setattr(
        encoding,
        "encode_texts",
        lambda *args, **options: calls.append(1) or encode_texts(*args, **options),
    )

    def encodes(tokenizer: Any = TOKENIZER, **options: Any) -> bool:
        """Whether texts of the table were tokenized, besides the ending of a turn."""
        calls.clear()
        encode_dataset(table, tokenizer, IDS, **{"max_length": 200} | options)
        return len(calls) > 1

    assert encodes()
    TOKENIZER(["Tom"], padding=True, truncation=True, max_length=4)  # its state is not its rules
    assert not encodes()
    assert encodes(max_length=100)
    assert encodes(eos_labels=3)
    assert encodes(with_template(CHATML))
    assert not encodes()


def test_an_error_from_another_process_is_the_same_sentence() -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([*RECORDS, {"prompt": "a", "response": None}])
    with pytest.raises(InputError, match="the data, row 41: a record without a response"):
        encode(table, num_proc=2)
    table = datasets.Dataset.from_list([*RECORDS, record("3 " * 300)])
    with pytest.raises(InputError, match="the data, row 41: .* leave no room for 8 EOS") as raised:
        encode(table, num_proc=2)
    assert "`truncate` or `skip`" in str(raised.value.hint)


def test_one_chat_template_of_many_processes_is_rendered_apart() -> None:
    """A template that is not plain runs in a process of its own, one for each that asks."""
    datasets = pytest.importorskip("datasets")
    tokenizer = with_template(LLADA)
    expected = encode_dataset(RECORDS, tokenizer, IDS, max_length=200)
    table = datasets.Dataset.from_list(RECORDS)
    encoded = encode_dataset(table, tokenizer, IDS, max_length=200, num_proc=2)
    assert [each["prompt_ids"] for each in encoded] == [each["prompt_ids"] for each in expected]


def test_what_cannot_be_encoded_says_why() -> None:
    datasets = pytest.importorskip("datasets")
    with pytest.raises(InputError, match="there is no tokenizer to encode train_dataset with"):
        encode_dataset(RECORDS, None, IDS, max_length=9, name="train_dataset")
    table = datasets.Dataset.from_list(RECORDS)
    with pytest.raises(InputError, match="the data is a mapping of the splits train, test"):
        encode(datasets.DatasetDict(train=table, test=table))
    with pytest.raises(InputError, match="the data must be a list of records, .* got 'gsm8k'"):
        encode("gsm8k")
    with pytest.raises(InputError, match="the data, row 1: expected a JSON object, got 3"):
        encode([3])
