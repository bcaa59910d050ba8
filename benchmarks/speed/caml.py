"""What CAML's omni-correlation and its bank cost: as a share of a CAML step, and against the public way of
computing them.

    python -m benchmarks.speed.caml    # left atrium plan at 2.5 mm, batch 2, one thread
    python -m benchmarks.speed.caml --device cuda --features 32 64 128 256 320 320 \\
        --patch 80 160 160 --strides 1 2 2 2 2 1,2,2

The part: predictions to agreement, rows for the bank, the bank itself, choice of voxels, heads, loss, and the
backward pass to features and heads; on features of the last decoder stage and predictions that are right in
most voxels, with a bank that has seen all labeled cases.

The public way is tests/reference/caml.py: batch-normalised heads on all voxels, full sorts, a bank of all
right voxels on the host. It uses 12,800 queries per class; ours takes a share of small patches by default,
and is measured with 12,800, too.

Host reads: operations of a step for which the host waits for the device, or whose shapes depend on values
there (tests/host_reads.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any

import torch

from benchmarks.speed.steps import CLASSES, Setting, full_step, make, parse_strides
from benchmarks.speed.timing import command, machine, medians, peak_bytes, table
from nnssl.batch import SemiBatch
from nnssl.method import SemiMethod, weighted_sum
from nnssl.methods.caml import CAML, CAMLConfig
from tests.host_reads import HostReads
from tests.reference.caml import PublicOmniCorrelation

CASES = ("a", "b", "c", "d", "e", "f", "g", "h")
STEP, OURS, OURS_AT_12800, PUBLIC = (
    "CAML step",
    "omni-correlation",
    "omni-correlation, 12,800 queries",
    "the public way",
)


class Part:
    """One step's omni-correlation, ours or the public one, on fixed features and predictions; the labeled
    cases take turns."""

    def __init__(self, setting: Setting, batch: SemiBatch) -> None:
        label = batch.full_target()[:, 0].long()
        truth = torch.nn.functional.one_hot(torch.cat([label, label]), CLASSES).movedim(-1, 1).float()
        self.logits = [4 * truth + 2 * torch.randn_like(truth) for _ in "va"]
        shape = (len(truth), setting.features[0], *setting.patch)
        self.features = [torch.randn(shape, device=setting.device, requires_grad=True) for _ in "va"]
        self.label, self.n = label, len(label)
        self.turn = cycle(CASES)

    def cases(self) -> list[str]:
        return [next(self.turn) for _ in range(self.n)]

    def ours(self, method: CAML, batch: SemiBatch) -> None:
        labels, n = method.labels, self.n
        p_v, p_a = (
            method.probabilities(z) for z in self.logits
        )  # the step has these anyway, the public way computes them as well
        agreed = labels.classes(labels.harden(p_v)) & labels.classes(labels.harden(p_a))
        right = agreed[:, :n] & labels.classes(labels.encode(self.label[:, None])[0])
        f_v, f_a = self.features
        method.pending = method.labeled_rows(f_v[:n], f_a[:n], right)
        loss = method.correlation_term(f_v[n:], f_a[n:], p_v[n:].detach(), agreed[:, n:])
        torch.autograd.grad(
            loss,
            [*self.features, *method.head_v.parameters(), *method.head_a.parameters()],
            allow_unused=True,
        )
        method.after_step(replace(batch, labeled_cases=self.cases()), 0.5)

    def public(self, term: PublicOmniCorrelation) -> None:
        loss = term(self.features, self.logits, self.label, self.cases())
        torch.autograd.grad(loss, [*self.features, *term.parameters()], allow_unused=True)

    def agreement(self) -> float:
        v, a = (z[self.n :].argmax(1) for z in self.logits)
        return (v == a).float().mean().item()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    device = torch.device(args.device)
    setting = Setting(
        args.features, parse_strides(args.strides), args.patch, args.batch, args.spacing, device, args.amp
    )
    method, step, batch = make(CAML, CAMLConfig(), setting)
    part = Part(setting, batch)
    calls: dict[str, Callable[[], None]] = {STEP: partial(full_step, method, step, batch)}
    banks = {}
    for name, config in ((OURS, CAMLConfig()), (OURS_AT_12800, CAMLConfig(query_share=1.0))):
        alone = CAML(setting.network(), config, replace(setting.planned(), labeled_cases=CASES)).to(device)
        calls[name] = partial(part.ours, alone, batch)
        banks[name] = alone.bank.rows.nbytes
    c = CAMLConfig()
    public = PublicOmniCorrelation(
        setting.features[0], c.embedding, CLASSES, c.rows, c.queries, c.temperature, batch_norm=True
    ).to(device)
    calls[PUBLIC] = partial(part.public, public)
    for name in (OURS, OURS_AT_12800, PUBLIC):
        for _ in range(-(-len(CASES) // args.batch)):  # every case is in the bank
            calls[name]()
    banks[PUBLIC] = sum(array.nbytes for entry in public.bank.values() for array in entry)
    reads = {}
    for name, call in calls.items():
        with HostReads() as found:
            method_alone(method, batch) if name == STEP else call()
        reads[name] = len(found.found)
    peaks = {name: peak_bytes(call, device) for name, call in calls.items() if name != STEP}
    seconds = medians(calls, args.repeats, device)
    return {
        "seconds": seconds,
        "bytes": peaks,
        "banks": banks,
        "reads": reads,
        "agreement": part.agreement(),
        "machine": machine(device),
    }


def method_alone(method: SemiMethod, batch: SemiBatch) -> None:
    """A step without the trainer's own look at whether the loss is finite."""
    method.before_step(0.5)
    terms, weights = method(batch, 0.5), method.weights(0.5)
    weighted_sum(terms, weights).backward()
    method.after_step(batch, 0.5)


def report(results: dict[str, Any], args: argparse.Namespace) -> str:
    batch = f"batch {args.batch} + {args.batch}"
    shape = f"patch {args.patch}, features {args.features}, {batch}, {len(CASES)} labeled cases"
    rows = []
    for allocator, result in results.items():
        s, mib = result["seconds"], 2**20
        rows.append([allocator, STEP, 1e3 * s[STEP], "", "", "", "", result["reads"][STEP]])
        for name in (OURS, OURS_AT_12800, PUBLIC):
            share = s[name] / (s[STEP] - s[OURS] + s[name])  # of the step that has this part
            sizes = result["bytes"][name] / mib, result["banks"][name] / mib
            rows.append(
                [
                    allocator,
                    name,
                    1e3 * s[name],
                    f"{100 * share:.1f} %",
                    f"{s[PUBLIC] / s[name]:.1f}x",
                    *sizes,
                    result["reads"][name],
                ]
            )
    first = next(iter(results.values()))
    header = [
        "allocator",
        "",
        "ms",
        "share of its step",
        "faster than the public way",
        "peak, MiB",
        "bank, MiB",
        "host reads",
    ]
    notes = (
        f"The networks agree in {100 * first['agreement']:.0f} % of the unlabeled voxels. "
        "On CPU the public way's copies of its bank to and from the host are free and not counted."
    )
    return "\n\n".join([f"{first['machine']}; {shape}", table(header, rows), notes])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--features", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--strides", nargs="+", default=["1", "2", "2", "1,2,2"])
    parser.add_argument("--patch", type=int, nargs=3, default=[24, 40, 48])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--spacing", type=float, default=2.5)
    parser.add_argument("--amp", default="float16", choices=["float16", "bfloat16", "float32"])
    command("caml", parser, measure, report, 5)


if __name__ == "__main__":
    main()
