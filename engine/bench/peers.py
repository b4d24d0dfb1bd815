"""Other engines on the same prompts, interleaved with plain decoding here.

``transformers`` generates in this process, one prompt at a time. ``url=…`` is any OpenAI-compatible server; against it
a whole system of this project is started, so that both answer over HTTP to the same client; it audits nothing.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import psutil

from engine.bench.blocks import NONE, Run, rate_figures, ratio_figure
from engine.bench.report import Figure
from engine.bench.rig import rig
from engine.bench.workload import Ids, Workload
from engine.contracts import ServingPlan, SlipstreamError
from engine.demo.traffic import served_model
from engine.model.linear import multiplies_bfloat16
from engine.settings import Settings
from engine.store.database import Database
from engine.store.repositories import plans

if TYPE_CHECKING:
    from engine.bench.serving import Bench

TIMEOUT_S = 600.0
QUIET, LOOK_S, LOOKS = 0.2, 0.25, 40
"""Processors that may be in use when a block begins, over so many seconds; how often to look for that."""
LEAST_PAIRS = 4
"""Blocks that an interval is made of at least; the prompts come again where there are too few of them."""


def measure(
    peer: str, settings: Settings, bench: Bench, work: Sequence[Workload], rng: np.random.Generator
) -> list[Figure]:
    """Figures of one ``--peer``."""
    if peer == "transformers":
        return _transformers(bench, work, rng)
    if peer.startswith("url="):
        return _url(peer.removeprefix("url="), settings, bench, work, rng)
    raise SlipstreamError(f"There is no peer {peer!r}: --peer takes transformers, or url=http://host:port of a server.")


def _transformers(bench: Bench, work: Sequence[Workload], rng: np.random.Generator) -> list[Figure]:
    generate = _transformers_generate(bench)
    pairs = []
    for workload in work:
        for number, ids in enumerate(workload.test, 1):
            runs: dict[str, Run] = {}
            for name in random.Random(int(rng.integers(1 << 30))).sample((NONE, "transformers"), 2):
                one = bench.serve([ids], NONE, workload.traffic_class, 1) if name == NONE else generate(ids)
                runs[name] = one
            pairs.append((runs[NONE], runs["transformers"]))
            rates = ", ".join(f"{name} {run.tokens / run.seconds:.1f}" for name, run in runs.items())
            bench.say(f"{workload.traffic_class} against transformers {number}/{len(workload.test)}: tokens/s {rates}")
    theirs = [pair[1] for pair in pairs]
    return [
        ratio_figure("ratio:none/transformers:all:c1", pairs, rng),
        *rate_figures("transformers:all:c1", theirs, rng),
    ]


def _transformers_generate(bench: Bench) -> Callable[[Ids], Run]:
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise SlipstreamError("--peer transformers needs the package: pip install 'transformers>=5,<6'.") from None
    target, tokens = bench.target, bench.options.tokens
    device = target.model.device
    dtype = target.model.dtype
    if dtype == torch.bfloat16 and device.type == "cpu" and not multiplies_bfloat16():
        dtype = torch.float32  # what it is fastest in where only our product reads bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(target.folder, dtype=dtype).to(device).eval()
    eos = sorted(target.tokenizer.eos_ids)

    def generate(ids: Ids) -> Run:
        prompt = torch.tensor([ids], device=device)
        began, cpu = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=eos,
                pad_token_id=eos[0],
            )[0].tolist()  # reading the tokens waits for the device: only then is it done
        return Run(len(out) - len(ids), time.perf_counter() - began, time.process_time() - cpu)

    generate((*bench.target.tokenizer.encode("warm up"),))
    return generate


def _url(
    url: str, settings: Settings, bench: Bench, work: Sequence[Workload], rng: np.random.Generator
) -> list[Figure]:
    peer, figures = Server(url), list[Figure]()
    order = random.Random(int(rng.integers(1 << 30)))
    unaudited = settings.engine.model_copy(update={"audit_tokens_per_minute": 0})  # in idle time, that is the peer's
    with rig(settings.model_copy(update={"engine": unaudited}), bench.say) as system:
        system.followed(plain_plan(system.database))
        ours = Server(system.url)
        for concurrency in bench.options.concurrency:
            pairs = []
            parts = blocks_of([text for workload in work for text in workload.texts], max(concurrency, 2), order)
            for server in (ours, peer):  # what a server sets up with its first requests, of every size, is not counted
                server.serve(parts[0], concurrency, bench.options.tokens)
            for number, part in enumerate(parts, 1):
                servers = {"none": ours, "peer": peer}
                runs = dict[str, Run]()
                for name in order.sample(sorted(servers), 2):
                    quiet(bench.say)
                    runs[name] = servers[name].serve(part, concurrency, bench.options.tokens)
                pairs.append((runs["none"], runs["peer"]))
                rates = ", ".join(f"{name} {run.tokens / run.seconds:.1f}" for name, run in runs.items())
                bench.say(f"c{concurrency} against {url} {number}/{len(parts)}: tokens/s {rates}")
            figures += [
                ratio_figure(f"ratio:none/url:all:c{concurrency}", pairs, rng),
                *rate_figures(f"http:all:c{concurrency}", [pair[0] for pair in pairs], rng)[:1],
                *rate_figures(f"url:all:c{concurrency}", [pair[1] for pair in pairs], rng)[:1],
            ]
    return figures


def quiet(
    say: Callable[[str], None],
    used: Callable[[float], float] = psutil.cpu_percent,
    processors: int = psutil.cpu_count() or 1,
) -> None:
    """Come back when the processors have nothing to do, or say that they do not come to rest.

    A server may look for more work for a second after its last request, with a whole processor (vLLM does), which is
    not what the other one's next block is to be measured beside. ``used`` gives per cent of all over so many seconds.
    """
    for _ in range(LOOKS):
        busy = used(LOOK_S) / 100 * processors
        if busy < QUIET:
            return
    say(f"something else uses {busy:.1f} processors and does not stop: figures against a peer suffer from it")


def plain_plan(database: Database) -> ServingPlan:
    """A plan that decodes plainly: an empty system looks drafts up in the prompt, which is not what is compared."""
    with database.write() as session:
        first = plans.latest(session)
        if first is None:
            raise SlipstreamError("No engine has followed a plan yet in the system that shall be measured.")
        return plans.roll_back(session, actor="bench", reason="plain decoding against a peer", to=first.fallback)


def blocks_of(texts: Sequence[str], size: int, order: random.Random) -> list[list[str]]:
    """``texts`` in blocks of ``size``, at least ``LEAST_PAIRS`` of them: shuffled, and once more where they run out."""
    if len(texts) < size:
        raise SlipstreamError(f"{size} prompts make a block against a peer, there are {len(texts)}: raise --prompts.")
    blocks: list[list[str]] = []
    while len(blocks) < LEAST_PAIRS:
        mixed = order.sample(list(texts), len(texts))
        blocks += [mixed[at : at + size] for at in range(0, len(mixed) - size + 1, size)]
    return blocks


class Server:
    """An OpenAI-compatible server, and requests to it from several clients at once."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        try:
            self.model = served_model(self.url)
        except (httpx.HTTPError, KeyError, IndexError, ValueError) as error:
            raise SlipstreamError(f"No OpenAI-compatible server answers at {url}: {error}") from None

    def serve(self, texts: Sequence[str], concurrency: int, tokens: int) -> Run:
        with httpx.Client(timeout=TIMEOUT_S) as client, ThreadPoolExecutor(concurrency) as clients:
            began = time.perf_counter()
            made = sum(clients.map(lambda text: self.ask(client, text, tokens), texts))
            return Run(made, time.perf_counter() - began)

    def ask(self, client: httpx.Client, text: str, tokens: int) -> int:
        """Tokens of one greedy answer of at most ``tokens``."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": tokens,
            "temperature": 0.0,
        }
        answer = client.post(f"{self.url}/v1/chat/completions", json=body)
        answer.raise_for_status()
        return int(answer.json()["usage"]["completion_tokens"])
