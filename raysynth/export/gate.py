"""What leaves has passed its privacy audit, or goes with a reason that is recorded."""

from __future__ import annotations

import zarr

from raysynth.config import ExperimentConfig
from raysynth.errors import InputError, Refused
from raysynth.store.reader import SampleSet, open_group


def open_gate(
    config: ExperimentConfig, root: zarr.Group, samples: SampleSet, without_audit: str | None
) -> tuple[SampleSet | None, str | None]:
    """The audit of exactly this run, and the reason that stands in for a passing one.

    Args:
        config: the recipe.
        root: of the store.
        samples: the run.
        without_audit: why it may leave without a passing audit; None: it may not.

    Returns:
        The audit, None if there is none of this run; and the reason, None if none was needed.

    Raises:
        Refused: no passing audit of this run under the recipe's policy, and no reason.
        InputError: an empty reason.
    """
    if without_audit is not None and not without_audit.strip():
        raise InputError("--without-audit '': say why this run may leave without an audit")
    table, problem = _audit(config, root, samples)
    if not problem:
        return table, None
    if without_audit is None:
        raise Refused(f"{problem}; or give a reason with --without-audit, which is recorded")
    return table, without_audit


def _audit(
    config: ExperimentConfig, root: zarr.Group, samples: SampleSet
) -> tuple[SampleSet | None, str]:
    """The audit of exactly this run, if there is one, and why it does not let the run leave."""
    again = f"run `raysynth audit` on the recipe of {config.name}"
    place = f"audits/{config.name}"
    if place not in root:
        return None, f"synthetic/{config.name} has no audit: {again}"
    table = SampleSet(open_group(root, place))
    for name in ("plan", "bundle"):
        if table.attrs[name] != samples.attrs[name]:
            return None, f"the audit of synthetic/{config.name} is of another {name}: {again}"
    if table.attrs["verdict"] != "passed":
        reasons = "; ".join(table.attrs["findings"]["reasons"])
        return table, f"synthetic/{config.name} failed its audit: {reasons}"
    if table.attrs["policy"] != config.audit.model_dump(mode="json"):
        return table, f"synthetic/{config.name} was audited under another policy: {again}"
    return table, ""
