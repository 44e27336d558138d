"""The state of one run of the kernel benchmark: device, clock, memory, results; and how one case is measured."""

from __future__ import annotations

import contextlib
import importlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from specattn_vllm.bench.kernel_data import Arena
from specattn_vllm.bench.kernel_report import Row
from specattn_vllm.bench.kernel_timing import Clock, ContextLost

Calls = Sequence[Callable[[], object]]

# bf16 softmax weights and outputs differ from an fp32 reference by a few parts in a thousand.
MAX_ERROR = 0.02
# Modules of `specattn_vllm.kernels` that may hold an operation.
MODULES = {
    "draft_attention": ("draft_attention",),
    "accumulate_mass": ("accumulate_mass",),
    "add_followers": ("add_followers",),
    "select_top_p": ("top_p",),
    "build_page_tables": ("page_tables",),
    "build_positions": ("page_tables", "positions"),
    "sparse_attention": ("sparse_attention",),
}


class Skip(Exception):
    """The case does not apply here; the message is the reason."""


class Bench:
    def __init__(
        self, device: torch.device, dtype: torch.dtype, *, quick: bool, seconds: float, started: float
    ) -> None:
        """started: time.monotonic() when the run began; past `seconds` from then, cases are skipped."""
        self.device, self.dtype, self.quick = device, dtype, quick
        self.seconds, self.started = seconds, started
        self.clock = Clock(device, 12.0 if quick else 25.0)
        self.arena = Arena(device, dtype)
        self.rows: list[Row] = []
        self.copy_gb_per_s: float | None = None
        self.lost: str | None = None

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def element(self) -> int:
        return self.dtype.itemsize

    def tidy(self) -> None:
        """Give the memory of a group's inputs back; the arena stays."""
        if self.cuda and not self.lost:
            with contextlib.suppress(RuntimeError):  # a fault that shows only now is met by the next case
                torch.cuda.empty_cache()

    def operation(self, name: str) -> Callable[..., None]:
        """The Triton kernel of an operation on CUDA, its PyTorch reference on CPU."""
        if not self.cuda:
            from specattn_vllm.kernels import reference

            if not hasattr(reference, name):
                raise Skip(f"specattn_vllm.kernels.reference has no {name}")
            return getattr(reference, name)
        for module in MODULES[name]:
            try:
                found = importlib.import_module(f"specattn_vllm.kernels.{module}")
            except ModuleNotFoundError as error:
                if error.name != f"specattn_vllm.kernels.{module}":
                    raise
                continue
            if hasattr(found, name):
                return getattr(found, name)
        raise Skip(f"specattn_vllm.kernels has no {name}")

    def executor(self, name: str) -> Any:
        """`specattn_vllm.executors.<name>`, where it runs here."""
        if not self.cuda:
            raise Skip(f"{name} needs CUDA")
        try:
            module = importlib.import_module(f"specattn_vllm.executors.{name}")
        except ImportError as error:
            raise Skip(f"specattn_vllm.executors.{name}: {error}") from error
        if reason := module.unavailable():
            raise Skip(reason)
        return module

    def measure(
        self,
        group: str,
        case: str,
        shape: object,
        make: Callable[[], Calls],
        nbytes: int | None,
        against: Row | None = None,
        target: dict[str, float] | None = None,
        check: Callable[[], float] | None = None,
        **parameters: Any,
    ) -> Row:
        """One row: time what `make` returns. Nothing that a case does ends the run.

        check: the error of the operation's result against a reference, relative, measured after the first calls.
        """
        row = Row(group, case, str(shape), parameters, bytes=nbytes)
        self.rows.append(row)
        if self.lost:
            row.skipped = f"the CUDA context was lost: {self.lost}"
            return row
        if time.monotonic() - self.started > self.seconds:
            row.skipped = f"the run's {self.seconds:g} s were over: ask for less with --only or --grid"
            return row
        try:
            calls = make()
            timing = self.clock(calls)
        except Skip as reason:
            row.skipped = str(reason)
        except ContextLost as error:
            self.lost = row.error = _line(error)
        except Exception as error:
            row.error = _line(error)
        else:
            row.ms, row.ms_p10, row.ms_p90 = (round(t, 5) for t in timing[:3])
            row.samples, row.calls, row.timing = timing.samples, timing.calls, timing.how
            if timing.note:
                row.add_note(timing.note)
            self._rates(row, len(calls))
            # The targets are a GPU's.
            row.compare(against, target if self.cuda else None)
            if check is not None:
                self._check(row, check)
        return row

    def add_up(
        self, group: str, case: str, shape: object, parts: Sequence[Row], against: Row | None = None, **parameters: Any
    ) -> Row:
        """One row whose time is that of others together; without any one of them it has none."""
        row = Row(group, case, str(shape))
        self.rows.append(row)
        if missing := [part.case for part in parts if part.ms is None]:
            row.skipped = f"not measured: {', '.join(missing)}"
            return row
        row.parameters = {**parameters, "parts": {part.case: part.ms for part in parts}}
        row.ms, row.timing = round(sum(part.ms for part in parts), 5), "sum"
        row.compare(against)
        return row

    @staticmethod
    def _check(row: Row, check: Callable[[], float]) -> None:
        try:
            error = check()
        except Exception as failed:
            row.add_note(f"result not checked: {_line(failed)}")
            return
        # JSON has no NaN, and a comparison with one is false.
        row.relative_error = float(f"{error:.3g}") if math.isfinite(error) else None
        if not error <= MAX_ERROR:
            row.add_note(f"RESULT DIFFERS from the reference by {error:.2g}")

    def _rates(self, row: Row, operands: int) -> None:
        if not row.bytes or not row.ms:
            return
        row.gb_per_s = round(row.bytes / row.ms / 1e6, 1)
        if self.copy_gb_per_s:
            row.bound_ms = round(row.bytes / self.copy_gb_per_s / 1e6, 5)
            row.share_of_copy = round(row.gb_per_s / self.copy_gb_per_s, 4)
            if row.share_of_copy > 1.1:
                row.add_note("faster than memory: operands were in L2, or not everything was read")
        rotated = row.bytes * min(operands, row.calls)
        if row.timing == "graph" and rotated < 2 * self.clock.l2:
            row.add_note("operands partly in L2")


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """|got - wanted| / |wanted|; NaN where either holds one."""
    got, wanted = got.double(), wanted.double()
    return float((got - wanted).norm() / wanted.norm().clamp(min=1e-30))


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else ''}".rstrip(": ")
