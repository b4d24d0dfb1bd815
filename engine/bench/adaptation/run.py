"""The benchmark from prompts to report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from engine.bench.adaptation import figures, live, output
from engine.bench.adaptation.arms import AdaptiveArm, Arm, Served, offline
from engine.bench.adaptation.figures import Run
from engine.bench.adaptation.prepare import Material, prepare
from engine.bench.adaptation.sabotage import sabotaged
from engine.bench.adaptation.streams import STREAMS, Response, Stream, stream
from engine.bench.report import Figure, Report, count_figure
from engine.learner.memory import MemoryLearner
from engine.ops.supervisor import Say
from engine.settings import Settings
from engine.speculation.ngram import NgramProposer
from engine.speculation.none import NoneProposer
from engine.speculation.proposer import Proposer

AHEAD, ENOUGH = 200, 16
"""Requests on which a served version is held against the one before, and how many of a class say something of it."""
WORSE = 0.02
CONTEXT = "static+context"
"""Static, a neural draft, beside the request's own context. Adaptive arms start from it, as a hybrid has that context
before it has learned anything; what of their gain is learned shows against this one."""


@dataclass(frozen=True, slots=True)
class Options:
    """``busy``: price passes by CPU time, for a machine with neighbours; needs engine.threads=1.
    ``prompts``: JSONL files, none for the project's own. ``corpus``: a JSONL file of ``prompt`` and
    ``response_token_ids``, of which a memory is static. ``static``: a policy's folder instead; without either the draft
    that comes with the project, or for another model a memory of a third of the prompts. ``tune``: requests on which
    every ``tune_every``-th candidate tunes its neural draft. ``verify``: requests of a class decoded for real.
    ``out``: where JSON, CSV and page go."""

    prompts: tuple[Path, ...] = ()
    corpus: Path | None = None
    static: Path | None = None
    streams: tuple[str, ...] = STREAMS
    seeds: int = 3
    tokens: int = 128
    every: int = 16
    tune: int = 0
    tune_every: int = 5
    verify: int = 8
    limit: int = 0
    seed: int = 0
    busy: bool = False
    out: Path | None = None


def run(settings: Settings, options: Options, say: Say) -> Report:
    wanted = replace_learner(settings, options.every, options.tune)
    material = prepare(wanted, options, say)
    rng = np.random.default_rng(options.seed)
    runs: dict[str, list[Run]] = {name: [] for name in options.streams}
    arms: dict[tuple[str, int], dict[str, Arm]] = {}
    for seed in range(options.seed, options.seed + options.seeds):
        for name in options.streams:
            began = time.monotonic()
            one = stream(name, material.classes, seed)
            done, used = _play(one, material, seed, rng)
            runs[name].append(done)
            arms[name, seed] = used
            say(f"{name}, seed {seed}: {len(one.requests)} requests under {len(used)} arms, "
                f"{time.monotonic() - began:.0f} s")  # fmt: skip
    found = _figures(runs, arms, material, rng)
    found.append(_day0(material, options, rng))
    if options.verify and "shift" in runs:
        gated = arms["shift", options.seed]["gated"].proposer
        say("decoding a subsample for real")
        found += live.verify(material, gated, options.verify, rng)
    report = Report("adaptation", options.seed, found)
    if options.out is not None:
        output.write(options.out, report, runs, arms)
        say(f"{options.out}: figures.json, requests.csv, attempts.csv, page.html")
    return report


def replace_learner(settings: Settings, every: int, tune: int) -> Settings:
    changed = settings.learner.model_copy(update={"every_requests": every, "tune_requests": tune})
    return settings.model_copy(update={"learner": changed})


def _arms(material: Material, seed: int) -> dict[str, Arm]:
    world = replace(material.world, seed=seed)
    static, corpus, start = material.static, material.corpus, material.context or material.static
    frozen = {"static": static} if material.context is None else {"static": static, CONTEXT: start}
    return {
        "none": Arm("none", world, NoneProposer()),
        "ngram": Arm("ngram", world, NgramProposer(world.settings.num_speculative_tokens)),
        **{name: Arm(name, world, proposer) for name, proposer in frozen.items()},
        "ungated": AdaptiveArm("ungated", world, start, corpus, gated=False),
        "gated": AdaptiveArm("gated", world, start, corpus, gated=True),
    }


def _play(one: Stream, material: Material, seed: int, rng: np.random.Generator) -> tuple[Run, dict[str, Arm]]:
    """Every arm serves a request before the next one comes."""
    arms = _arms(material, seed)
    served: dict[str, list[Served]] = {name: [] for name in arms}
    if one.name == "planted":
        for arm in arms.values():
            if isinstance(arm, AdaptiveArm):
                arm.saboteur = partial(sabotaged, rng=rng, overshoot=partial(_overshoot, arm))
    for response in one.requests:
        for name, arm in arms.items():
            served[name].append(arm.serve(response))
    judged = _offline(one, material) if one.name == "shift" else {}
    return Run(one, seed, served, judged), arms


def _overshoot(arm: AdaptiveArm, draft: dict[str, bytes]) -> dict[str, bytes]:
    return arm.world.overshot(draft, arm.traffic.train)


def _offline(one: Stream, material: Material) -> dict[int, Served]:
    """Each request under a policy trained offline on the corpus and on its class; two halves, each judged by a policy
    that learned the other, so that none was taught by what it is judged on."""
    found: dict[int, Served] = {}
    learner = MemoryLearner()
    for phase in one.phases:
        places = list(range(phase.first, phase.last))
        for side in (0, 1):
            taught = [one.requests[at] for at in places[1 - side :: 2]]
            after = len(one.requests) * (1 + side) + phase.first
            policy = offline(material.world, material.corpus, taught, learner, after)
            arm = Arm("offline", material.world, policy)
            found |= {at: arm.serve(one.requests[at]) for at in places[side::2]}
    return found


def _figures(
    runs: Mapping[str, Sequence[Run]],
    arms: Mapping[tuple[str, int], Mapping[str, Arm]],
    material: Material,
    rng: np.random.Generator,
) -> list[Figure]:
    found: list[Figure] = []
    for name, done in runs.items():
        for first, second in _pairs(
            material, ("gated", "ungated"), ("ungated", "static"), ("gated", "none"), ("static", "none")
        ):
            rows = [row for r in done for row in figures.pairs(r, first, second, range(len(r.stream.requests)), True)]
            found.append(figures.ratio(f"ratio:{first}/{second}:{name}:all", rows, rng))
    for traffic_class in sorted(material.classes):
        if "shift" not in runs:
            break
        for first, second in _pairs(material, ("gated", "ngram"), ("gated", "none")):
            rows = [
                row
                for r in runs["shift"]
                for phase in r.stream.phases[1:]  # the first class is no shift
                if phase.traffic_class == traffic_class
                for row in figures.pairs(r, first, second, phase.second_half, False)
            ]
            if rows:
                found.append(figures.ratio(f"ratio:{first}/{second}:shift:{traffic_class}", rows, rng))
        if (one := figures.recovery(runs["shift"], "gated", traffic_class)) is not None:
            found.append(one)
    if "shift" in runs:
        found += [figures.regret(runs["shift"], name) for name in runs["shift"][0].arms]
        found += _reachable(runs["shift"], rng)
    if "planted" in runs:
        found += prevented(runs["planted"], {r.seed: arms["planted", r.seed] for r in runs["planted"]}, rng)
    if "recurring" in runs:
        rows = [row for r in runs["recurring"] for row in _returns(r, arms["recurring", r.seed]["gated"])]
        found.append(figures.lost("forgetting:recurring", rows, rng))
    return found


def prevented(runs: Sequence[Run], arms: Mapping[int, Mapping[str, Arm]], rng: np.random.Generator) -> list[Figure]:
    """Bad updates that came to be served, of those that load, and served versions worse than the one before: with the
    gate and without.

    ``arms``: by seed and name, those that served ``runs``. A version with too few requests after it is not among those
    counted. The worst class is chosen for its loss, which its interval knows nothing of.
    """
    found = []
    for name, suffix in (("gated", ""), ("ungated", ":ungated")):
        planted, losses = list[bool](), list[_Loss]()
        for run in runs:
            arm = arms[run.seed][name]
            assert isinstance(arm, AdaptiveArm)
            planted += [a.version is not None for a in arm.attempts if a.planted and a.loads]
            measured = (_worst_class(run, arm, a.at, a.version) for a in arm.attempts if a.version is not None)
            losses += [loss for loss in measured if loss is not None]
        worse = sum(share > WORSE for share, _ in losses)
        found.append(count_figure(f"bad_updates_served{suffix}", sum(planted), len(planted), "updates"))
        found.append(count_figure(f"worse_versions_served{suffix}", worse, len(losses), "versions"))
        if losses:
            _, rows = max(losses, key=lambda loss: loss[0])
            found.append(figures.lost(f"worst_class_loss{suffix}", rows, rng))
    return found


_Loss = tuple[float, list[tuple[object, figures.Pair]]]
"""(share of acceptance length lost, the requests that say so)."""


def _worst_class(run: Run, arm: AdaptiveArm, at: int, version: int) -> _Loss | None:
    """What a version loses against the one before it, in the class that loses most, over the ``AHEAD`` requests that
    come next (all of a class that has ``ENOUGH``); None where no class has, which says nothing of the version."""
    classes: dict[str, list[tuple[object, figures.Pair]]] = {}
    for response in run.stream.requests[at : at + AHEAD]:
        new, old = (_alone(arm, arm.served[v], response) for v in (version, version - 1))
        classes.setdefault(response.traffic_class, []).append((response.prompt_ids, (*new, *old)))
    found = [rows for rows in classes.values() if len(rows) >= ENOUGH]
    losses = [(float(figures.share_lost(np.array([row for _, row in rows]).sum(0))), rows) for rows in found]
    return max(losses, key=lambda loss: loss[0], default=None)


def _pairs(material: Material, *more: tuple[str, str]) -> list[tuple[str, str]]:
    return [("gated", "static"), *([("gated", CONTEXT)] if material.context is not None else []), *more]


def _reachable(runs: Sequence[Run], rng: np.random.Generator) -> list[Figure]:
    """What a policy trained offline on half of the class reaches over static: how much there was to gain."""
    rows: dict[str, list[tuple[object, figures.Pair]]] = {}
    for r in runs:
        for phase in r.stream.phases[1:]:
            for at in phase.second_half:
                a, b = r.offline[at], r.arms["static"][at]
                row = (float(a.tokens), a.decode_s, float(b.tokens), b.decode_s)
                rows.setdefault(phase.traffic_class, []).append((r.stream.requests[at].prompt_ids, row))
    return [figures.ratio(f"ratio:offline/static:shift:{name}", found, rng) for name, found in sorted(rows.items())]


def _returns(run: Run, arm: Arm) -> list[tuple[object, figures.Pair]]:
    """The first requests of each return, under the version that met them and under that which saw the class leave."""
    assert isinstance(arm, AdaptiveArm)
    rows: list[tuple[object, figures.Pair]] = []
    for left, back in ((0, 2), (1, 3)):
        before = run.arms["gated"][run.stream.phases[left].last - 1].version
        for at in range(run.stream.phases[back].first, run.stream.phases[back].first + figures.RETURN):
            if at >= run.stream.phases[back].last:
                break
            response, now = run.stream.requests[at], run.arms["gated"][at].version
            new, old = (_alone(arm, arm.served[version], response) for version in (now, before))
            rows.append((response.prompt_ids, (*new, *old)))
    return rows


def _alone(arm: Arm, proposer: Proposer, response: Response) -> tuple[float, float]:
    """(tokens, verify steps) with whole drafts: what the policy knows, whatever K control thinks of it."""
    from engine.speculation.replay import replay

    bound, _ = arm.world.bound(proposer)
    counts = replay(
        bound, response.traffic_class, response.prompt_ids, response.output_ids, max_tokens=arm.world.max_tokens
    )
    return float(counts.steps + counts.accepted), float(counts.steps)


def _day0(material: Material, options: Options, rng: np.random.Generator) -> Figure:
    """From no draft at all: the second half of the first 100 requests of one class, code where there is any."""
    name = "code" if "code" in material.classes else sorted(material.classes)[0]
    rows: list[tuple[object, figures.Pair]] = []
    for seed in range(options.seed, options.seed + options.seeds):
        world = replace(material.world, seed=seed, neural=None)  # nothing to start from
        one = stream("shift", {name: material.classes[name]}, seed)
        gated = AdaptiveArm("gated", world, NoneProposer(), (), gated=True)
        none = Arm("none", world, NoneProposer())
        requests = one.requests[:100]
        served = {"gated": [gated.serve(r) for r in requests], "none": [none.serve(r) for r in requests]}
        rows += figures.pairs(
            Run(one, seed, served, {}), "gated", "none", range(len(requests) // 2, len(requests)), True
        )
    return figures.ratio(f"ratio:gated/none:day0:{name}", rows, rng)
