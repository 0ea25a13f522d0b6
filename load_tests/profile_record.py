"""`python -m load_tests.profile_record`: the profile of your model on your accelerator.

    python -m load_tests.profile_record --config serve_configs/llama.yaml --out my-gpu.json

Starts one engine of the YAML file's application in this process, times its steps and the copies of
its KV blocks, and fits a profile to them, which an emulated engine can then stand for. Takes a
minute or two, in which nothing else should run on that accelerator.
"""

import argparse
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreRequest

from app.check import read_yaml
from app.config import FleetConfig, load
from app.resources import cpu_build
from app.validation import ConfigError, hint
from deployments import engine_config
from deployments.emulated.profile import work
from load_tests.profile_fit import Copy, Step, fit, save, table
from migration.worker import MigrationWorker

BATCHES = (1, 4, 16, 64, 256)
CONTEXTS = (64, 512, 4096)
PROMPTS = [16 << n for n in range(11)]
"""To 16k tokens. Of all sizes here, those are measured that the engine has room for."""

CHUNK, EVERY = 256, 4
"""Tokens of a step while the longest prompt is computed once more, and how many of these steps make
one measurement: they are many and much alike."""

COPIES = [64 << n for n in range(8)]

REPEATS = 11
ROOM = 64
"""Tokens that a request may grow by, while the rest of its batch is prefilled and after that."""

Measured = TypeVar("Measured", Step, Copy)


class Engine:
    """One engine, stepped by hand."""

    def __init__(self, config: FleetConfig) -> None:
        # On a GPU vLLM schedules the next step while one runs, and hides when each one ends. So it
        # must not do that here; instead, scheduling is left out of the times where it is hidden.
        settings = config.model.engine_kwargs
        self._hides_scheduling: bool = settings.get("async_scheduling", not cpu_build())
        synchronous = {"engine_kwargs": {**settings, "async_scheduling": False}}
        model = config.model.model_copy(update=synchronous)
        vllm_config = engine_config.build(model, config.engine)
        self.core = engine_config.start(vllm_config, transfers=1)
        self.max_model_len: int = vllm_config.model_config.max_model_len
        self._vocabulary: int = vllm_config.model_config.get_vocab_size()
        self._rng, self._ids = random.Random(0), itertools.count()

    def capacity(self) -> dict[str, int]:
        """The fields of `Profile` that say how much it holds."""
        scheduler = self.core.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        return {
            "blocks": pool.num_gpu_blocks - 1,  # vLLM keeps one for itself
            "block_size": scheduler.block_size,
            "max_batch": scheduler.max_num_running_reqs,
            "max_step_tokens": scheduler.max_num_scheduled_tokens,
        }

    def add(self, prompt_tokens: int) -> None:
        """A request that runs until `clear`; its prompt is random, so no prefix of it is cached."""
        request = EngineCoreRequest(
            request_id=f"{next(self._ids)}",
            prompt_token_ids=self._rng.choices(range(self._vocabulary), k=prompt_tokens),
            mm_features=None,
            sampling_params=SamplingParams(
                max_tokens=self.max_model_len, ignore_eos=True, temperature=0.0
            ),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        self.core.add_request(*self.core.preprocess_add_request(request))

    def step(self) -> Step:
        """One step, timed."""
        scheduler, executor = self.core.scheduler, self.core.model_executor
        began = time.perf_counter()
        scheduled = scheduler.schedule()
        running = time.perf_counter()
        output = executor.execute_model(scheduled)
        if output is None:
            output = executor.sample_tokens(None)
        ran = time.perf_counter()
        scheduler.update_from_output(scheduled, output)
        seconds = ran - running if self._hides_scheduling else time.perf_counter() - began
        return Step(*self._work(scheduled), seconds)

    def prefill(self) -> list[Step]:
        """The steps until all prompts are computed. One that only decodes has followed then."""
        return list(itertools.takewhile(lambda step: step.prefill_pairs, iter(self.step, None)))

    def clear(self) -> None:
        """Drop all requests."""
        self.core.abort_requests(list(self.core.scheduler.requests))

    def _work(self, scheduled: SchedulerOutput) -> tuple[int, int, float]:
        requests = self.core.scheduler.requests
        return work(
            (requests[name].num_computed_tokens - count, count)
            for name, count in scheduled.num_scheduled_tokens.items()
        )


def main() -> int:
    options = _options()
    try:
        config = load(arguments(options.config, options.application))
    except ConfigError as error:
        print(f"{options.config}: {error}", file=sys.stderr)
        return 1
    torch.set_num_threads(1)  # as Ray does for a replica; a GPU does not mind
    print("==> starting the engine", flush=True)
    engine = Engine(config)
    steps = measure("steps", step_cases(engine))
    copies = measure("copies of KV blocks", copy_cases(engine, options.link_gbps))
    profile = fit(steps, copies, **engine.capacity(), source=_source(config, options.link_gbps))
    engine.core.shutdown()
    print(table(profile, [*steps, *copies]))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save(profile, options.out)
    return 0


def arguments(file: Path, application: str) -> dict[str, Any]:
    """The `args` of that application in a Serve YAML file. Raises ConfigError."""
    found = {one.get("name"): one for one in read_yaml(file).get("applications") or []}
    if application not in found:
        raise ConfigError(f"no application {application!r}{hint(application, found)}")
    return found[application].get("args") or {}


def measure(what: str, cases: Sequence[Callable[[], list[Measured]]]) -> list[Measured]:
    """All that the cases measure, with a line for each."""
    print(f"==> measuring {what}", flush=True)
    measured = list[Measured]()
    for number, case in enumerate(cases, start=1):
        for point in case():
            measured.append(point)
            print(f"{number:>3}/{len(cases)} {point}: {1e3 * point.seconds:.2f} ms", flush=True)
    return measured


def step_cases(engine: Engine) -> list[Callable[[], list[Step]]]:
    """Batches that decode, then single prompts, and the longest of them in chunks."""
    batches = [(n, tokens) for n in BATCHES for tokens in CONTEXTS if _fits(engine, tokens, n)]
    prompts = [tokens for tokens in PROMPTS if _fits(engine, tokens)]
    return [
        *(partial(decode, engine, *batch) for batch in batches),
        *(partial(prefill, engine, tokens) for tokens in prompts),
        partial(prefill_in_chunks, engine, prompts[-1]),
    ]


def decode(engine: Engine, batch: int, context: int) -> list[Step]:
    """A step in which so many requests of so many tokens get one more each."""
    for _ in range(batch):
        engine.add(context)
    engine.prefill()
    steps = [engine.step() for _ in range(REPEATS)]
    engine.clear()
    return [_median(steps)]


def prefill(engine: Engine, tokens: int) -> list[Step]:
    """The steps that compute one prompt."""
    runs = list[list[Step]]()
    for _ in range(1 + REPEATS):
        engine.add(tokens)
        runs.append(engine.prefill())
        engine.clear()
    return [_median(steps) for steps in zip(*runs[1:], strict=True)]  # the first one warms up


def prefill_in_chunks(engine: Engine, tokens: int) -> list[Step]:
    """Some of the steps that compute one prompt in chunks."""
    scheduler = engine.core.scheduler
    usual, scheduler.max_num_scheduled_tokens = scheduler.max_num_scheduled_tokens, CHUNK
    steps = prefill(engine, tokens)
    scheduler.max_num_scheduled_tokens = usual
    return steps[EVERY - 1 :: EVERY]


def copy_cases(engine: Engine, link_gbps: float) -> list[Callable[[], list[Copy]]]:
    """Copies of more and more blocks."""
    capacity = engine.capacity()
    blocks = sorted({-(-tokens // capacity["block_size"]) for tokens in COPIES})
    return [partial(copy, engine, n, link_gbps) for n in blocks if n <= capacity["blocks"]]


def copy(engine: Engine, blocks: int, link_gbps: float) -> list[Copy]:
    """Out of the cache, over the link that all ranks share, and into the cache, one by one."""
    ranks = engine.core.collective_rpc(copy_blocks, args=(blocks,))
    seconds = max(seconds for seconds, _ in ranks)
    link_s = 8 * sum(copied for _, copied in ranks) / (1e9 * link_gbps)
    return [Copy(blocks * engine.capacity()["block_size"], seconds + link_s)]


def copy_blocks(worker: MigrationWorker, blocks: int) -> tuple[float, int]:
    """In a rank: what a move does with the cache on both its sides. Seconds, and bytes."""
    times = [_copy_once(worker, blocks) for _ in range(1 + REPEATS)]
    return statistics.median(seconds for seconds, _ in times), times[0][1]


def _copy_once(worker: MigrationWorker, blocks: int) -> tuple[float, int]:
    copied, began = 0, time.perf_counter()
    for ids in worker._mig_chunks(list(range(1, 1 + blocks))):
        packed = torch.stack([kv.index_select(worker._mig_dim(), ids) for kv in worker._mig_kv()])
        worker._mig_write(ids, packed)
        copied += packed.nbytes
    if packed.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began, copied


def _fits(engine: Engine, tokens: int, batch: int = 1) -> bool:
    capacity = engine.capacity()
    return (
        batch <= capacity["max_batch"]
        and tokens + ROOM <= engine.max_model_len
        and batch * (tokens + ROOM) <= capacity["blocks"] * capacity["block_size"]
    )


def _median(steps: Sequence[Step]) -> Step:
    return sorted(steps, key=lambda step: step.seconds)[len(steps) // 2]


def _source(config: FleetConfig, link_gbps: float) -> str:
    device = current_platform.get_device_name()
    link = f"KV over a link of {link_gbps:g} Gbit/s"
    return f"recorded by load_tests.profile_record: {config.model.model_id} on {device}, {link}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m load_tests.profile_record")
    parser.add_argument("--config", type=Path, required=True, help="a Serve YAML file")
    parser.add_argument("--application", default="llama", help="its name in that file")
    parser.add_argument("--out", type=Path, required=True, help="the profile to write, JSON")
    parser.add_argument(
        "--link-gbps", type=float, default=10.0, help="Gbit/s between two machines of the fleet"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
