"""Greedy equality on real weights and real prompts: equal up to ties, because kernels differ by row count."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from engine.model.batch import Row, build_batch
from engine.model.kv_cache import KVCache
from engine.model.loading import Target
from engine.runner.engine import Engine, EngineRequest, RequestResult
from engine.speculation.proposer import Proposer
from tests.runner.driving import MEMORY, NGRAM, NONE, engine_of, memory_of, request, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PER_FILE, LONGEST_PROMPT, MAX_TOKENS, TIE = 11, 200, 32, 1e-3


@pytest.fixture(scope="module")
def requests(smollm: Target, prompt_folder: Path) -> list[EngineRequest]:
    made = []
    for path in sorted(prompt_folder.glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        prompts = [
            (row["traffic_class"], smollm.tokenizer.apply_chat_template([{"role": "user", "content": row["turns"][0]}]))
            for row in rows
        ]
        # The shortest of each file keep the test short; summaries are too long for that altogether.
        prompts = sorted((p for p in prompts if len(p[1]) <= LONGEST_PROMPT), key=lambda p: len(p[1]))[:PER_FILE]
        made += [
            request(f"{path.stem}-{i}", ids, traffic_class=name, max_tokens=MAX_TOKENS, ignore_eos=False)
            for i, (name, ids) in enumerate(prompts)
        ]
    assert len(made) >= 50
    return made


def serve(
    target: Target, requests: Sequence[EngineRequest], version: int, extra: dict[int, Proposer] | None = None
) -> dict[str, RequestResult]:
    engine: Engine = engine_of(target, extra, max_num_seqs=16, max_model_len=256, clock=time.monotonic)
    for r in requests:
        engine.add(EngineRequest(r.request_id, r.prompt_ids, r.sampling, version, r.traffic_class))
    return run(engine)


@pytest.fixture(scope="module")
def plain(smollm: Target, requests: list[EngineRequest]) -> dict[str, RequestResult]:
    return serve(smollm, requests, NONE)


def top_two_gap(target: Target, ids: Sequence[int]) -> float:
    """How far apart the two best next tokens are after ``ids``, in logits."""
    model = target.model
    cache = KVCache(model.config, 1, len(ids), model.dtype)
    batch = build_batch([], [Row(0, 0, ids)], len(ids), model.config.group_size, model.dtype, torch.device("cpu"))
    best = model.logits(model.forward(batch, cache)[-1:]).topk(2).values[0]
    return float(best[0] - best[1])


def assert_equal_up_to_ties(
    target: Target, found: Mapping[str, RequestResult], plain: Mapping[str, RequestResult]
) -> None:
    """Where two outputs part, the best two logits must be as good as equal (methods.md section 4)."""
    for name, result in found.items():
        ours, theirs = result.payload.output_ids, plain[name].payload.output_ids
        if ours == theirs:
            continue
        at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
        gap = top_two_gap(target, [*result.payload.prompt_ids, *theirs[:at]])
        assert gap < TIE, f"{name} differs at output token {at}, where the best two logits are {gap} apart"


@pytest.mark.parametrize("version", [NGRAM, MEMORY])
def test_greedy_equals_plain_decoding(
    smollm: Target, requests: list[EngineRequest], plain: dict[str, RequestResult], version: int
) -> None:
    extra: dict[int, Proposer] = {MEMORY: memory_of([plain[r.request_id] for r in requests[::2]])}
    drafted = serve(smollm, requests, version, extra)
    assert drafted.keys() == plain.keys()
    assert_equal_up_to_ties(smollm, drafted, plain)
    assert sum(r.counts.accepted for r in drafted.values()) > 100
    assert all(r.draft_errors == 0 for r in drafted.values())


def test_a_swap_in_the_middle_of_generation_changes_no_output(
    smollm: Target, requests: list[EngineRequest], plain: dict[str, RequestResult]
) -> None:
    """Sixteen requests run under one version when it is taken away and another comes; sixteen begin under that one."""
    served = requests[:32]
    engine: Engine = engine_of(smollm, max_num_seqs=16, max_model_len=256, clock=time.monotonic)

    def add(some: Sequence[EngineRequest], version: int) -> None:
        for r in some:
            engine.add(EngineRequest(r.request_id, r.prompt_ids, r.sampling, version, r.traffic_class))

    add(served[:16], NGRAM)
    outputs = [output for _ in range(10) for output in engine.step()]
    running = {live.request_id for live in engine.scheduler.running.values()}
    engine.unload(NGRAM)
    engine.load(MEMORY, memory_of([plain[r.request_id] for r in requests[::2]]))
    add(served[16:], MEMORY)
    found = run(engine, outputs)
    assert len(running) > 8, "the swap must fall into the middle"
    assert found.keys() == {r.request_id for r in served}
    assert_equal_up_to_ties(smollm, found, plain)
    versions = {name: result.policy_version for name, result in found.items()}
    assert {versions[name] for name in running} == {NGRAM}
    assert {versions[r.request_id] for r in served[16:]} == {MEMORY}


def test_one_at_a_time_equals_sixteen_at_a_time(
    smollm: Target, requests: list[EngineRequest], plain: dict[str, RequestResult]
) -> None:
    for r in requests[::12]:
        assert_equal_up_to_ties(smollm, serve(smollm, [r], NONE), plain)


def test_it_speaks_english(smollm: Target) -> None:
    ids = smollm.tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}])
    result = serve(smollm, [request("x", ids, max_tokens=24, ignore_eos=False)], NONE)["x"]
    assert "Paris" in result.text
