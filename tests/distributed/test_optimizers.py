"""Muon, Lion and a class by import path take the same steps however a model is shared, and go on anywhere."""

from pathlib import Path

import pytest

from tests.support.distributed_runs import Run, train
from tests.support.processes import together

STEPS, SAVED_AT = 6, 3
TOLERANCES = {"train/loss": 1e-6, "optim/grad_norm": 1e-9}
"""The loss is averaged in fp32."""
MUON = (("optimizer", "muon"), ("groups", {"embedding": {"lr_factor": 0.5, "weight_decay": 0.1}}))
LION = (("optimizer", "lion"), ("lr", 1e-3))
SGD = (("optimizer", "torch.optim.SGD"), ("optimizer_options", {"momentum": 0.9}))


def case(strategy: str, ffn: str, optim: tuple[tuple[str, object], ...], **more: object) -> Run:
    """In fp64: an orthogonalization makes a large difference of a small one, as does a sign."""
    return Run(strategy, ffn, num_processes=2, steps=STEPS, double=True, optim=optim)._replace(**more)


CASES = [
    *(case(strategy, "dense", MUON) for strategy in ("ddp", "fsdp", "tp")),
    *(case(strategy, "moe", MUON) for strategy in ("fsdp", "tp", "ep")),
    # Of three experts one is in two processes.
    case("fsdp", "moe", MUON, options=(("moe", {"num_experts": 3}),)),
    *(case("fsdp", "dense", optim) for optim in (LION, SGD)),
    case("tp", "dense", LION),
]


def alone(run: Run) -> Run:
    return run._replace(strategy="one", num_processes=1, load=None, save=None)


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(CASES, id="two"),
        pytest.param([case("mesh", "moe", MUON, num_processes=4)], id="four", marks=pytest.mark.slow),
    ],
)
def test_steps_are_those_of_one_process(tmp_path: Path, cases: list[Run]) -> None:
    first, *others = together(cases[0].num_processes, tmp_path, train, cases)
    assert all(other == first for other in others), "to the bit, on all ranks"
    expected = {str(run): train(tmp_path, run) for run in map(alone, cases)}
    for run, curve in zip(cases, first, strict=True):
        for name, tolerance in TOLERANCES.items():
            wanted = [step[name] for step in expected[str(alone(run))]]
            assert len(wanted) == STEPS
            assert [step[name] for step in curve] == pytest.approx(wanted, rel=tolerance), f"{run}: {name}"


def test_a_checkpoint_of_two_goes_on_in_one_and_another_way(tmp_path: Path) -> None:
    saved = [
        case("fsdp", "dense", MUON, save="muon", save_at=SAVED_AT),
        case("ep", "moe", MUON, save="experts", save_at=SAVED_AT),
        case("fsdp", "dense", LION, save="lion", save_at=SAVED_AT),
        case("fsdp", "dense", SGD, save="sgd", save_at=SAVED_AT),
    ]
    together(2, tmp_path, train, saved)
    others = [
        run._replace(strategy=strategy, load=run.save, save=None)
        for run, strategy in zip(saved, ("tp", "fsdp", "ddp", "tp"), strict=True)
    ]
    found, _ = together(2, tmp_path, train, others)
    for run, curve in zip(others, found, strict=True):
        whole = train(tmp_path, alone(run))[SAVED_AT:]
        for resumed in (curve, train(tmp_path, alone(run)._replace(load=run.load))):
            for name, tolerance in TOLERANCES.items():
                wanted = [step[name] for step in whole]
                assert [step[name] for step in resumed] == pytest.approx(wanted, rel=tolerance), f"{run}: {name}"
