"""What completers over other engines share, without an engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from small import small_llama

from dmax.checkpoint import save_checkpoint
from dmax.errors import InputError
from dmax.integrations.completer import EngineCompleter, files_digest, flat_options, refused_by
from dmax.integrations.options import request_params
from dmax.outputs import Cost
from dmax.params import AUTO, DecodingParams
from dmax.tiny import bundled

SPD = DecodingParams(strategy="spd")


class SomeCompleter(EngineCompleter):
    """An engine that nobody starts."""

    engine = "Some"


@pytest.fixture(scope="module")
def completer() -> SomeCompleter:
    return SomeCompleter("tiny-dmax")


def test_auto_is_what_the_checkpoint_names(completer: SomeCompleter) -> None:
    assert completer.resolve(DecodingParams(strategy=AUTO)).strategy == "spd"
    assert completer.resolve(DecodingParams(strategy="threshold")).strategy == "threshold"


def test_figures_name_the_engine_and_the_files(completer: SomeCompleter) -> None:
    record = completer.record(
        SPD,
        version="1.2",
        device="cpu",
        dtype="torch.float32",
        max_batch_size=4,
        tensor_parallel_size=2,
    )
    assert record["environment"]["engine"] == "Some 1.2"
    assert record["environment"]["tensor_parallel_size"] == 2
    assert (record["dtype"], record["batch_size"], record["block_length"]) == ("float32", 4, 32)
    assert record["weights"] == files_digest(Path(str(bundled("tiny-dmax"))))
    assert record["weights"] != files_digest(Path(str(bundled("tiny-base"))))
    assert record["decoding"].startswith("SoftParallelDecoding(")


def test_prompts_are_encoded_as_in_our_own_engine(completer: SomeCompleter) -> None:
    ids = completer.encode_within("How many mugs are 2 + 2?", "the prompt", 1024)
    assert ids[0] == 978
    with pytest.raises(InputError, match="prompt 3 has 40 tokens, and Some has room for 40"):
        completer.encode_within([5] * 40, "prompt 3", 40)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "mbd"}, "needs 2 open blocks, and Some has one"),
        ({"block_length": 16}, "Some decodes blocks of 32"),
        ({"deadline": 3.0}, "Some has no `deadline`"),
    ],
)
def test_what_the_engine_cannot_do_is_refused(
    completer: SomeCompleter, change: dict[str, object], message: str
) -> None:
    completer.check(replace(SPD, block_length=32))
    with pytest.raises(InputError, match=message):
        completer.check(replace(SPD, **change))  # type: ignore[arg-type]


def test_a_completion_is_cut_at_its_eos_and_its_text_before_a_stop_text(
    completer: SomeCompleter,
) -> None:
    tokenizer = completer.checkpoint.tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode("Then 2 + 2 is 4.", add_special_tokens=False)
    params = replace(SPD, stop=(" is",))
    output = completer.output(0, (1, 2), [*ids, 976], "stop", Cost(num_forwards=3), params)
    assert output.token_ids == tuple(ids)
    assert output.text == tokenizer.decode(ids).partition(" is")[0]
    assert (output.num_forwards, output.finish_reason) == (3, "stop")
    kept = completer.output(0, (), [976], "length", Cost(), replace(SPD, ignore_eos=True))
    assert kept.token_ids == (976,)


def test_a_request_that_did_not_end_as_it_should_is_an_error(completer: SomeCompleter) -> None:
    with pytest.raises(InputError, match="Some ended prompt 7 with 'abort'"):
        completer.output(7, (), (), "abort", Cost(), SPD)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    made = small_llama()
    save_checkpoint(made.model, made.tokenizer, tmp_path / "llama", made.special_ids)
    with pytest.raises(InputError, match="has the architecture llama"):
        SomeCompleter(str(tmp_path / "llama"))


def test_what_an_engine_says_becomes_one_sentence() -> None:
    with pytest.raises(InputError, match="^Some: it is too long$"), refused_by("Some"):
        raise ValueError("it is too long\nby far")
    with pytest.raises(InputError, match="^as it was$"), refused_by("Some"):
        raise InputError("as it was")


def test_flat_options_are_read_back_as_the_same_parameters() -> None:
    params = DecodingParams(
        strategy="credit", threshold=0.7, top_k=2, max_steps_per_block=9, options={"alpha": 0.4}
    )
    assert request_params(flat_options(params), DecodingParams(strategy="spd")) == params
