"""What a synthetic run must keep to leave the house."""

from __future__ import annotations

from pydantic import Field

from raysynth.config.base import Section


class AuditConfig(Section):
    """The privacy audit and its policy.

    A sample is flagged if it is nearer to a training sample than held-out real ones ever come, by
    any criterion; flagged samples are never exported. A run fails if more samples are flagged than
    chance and `max_copy_rate` explain together: if the lower end of the flagged share's 95 %
    interval is above the sum of `max_copy_rate` and the most that honest samples may be flagged
    (97.5 % confidence, from the number of held-out samples). It also fails with more than
    `max_exact` samples that are the same picture as a training sample.
    """

    false_alarms: float = Field(0.01, gt=0, le=0.1)
    """Largest share of honest samples that may be flagged; 0.01 needs 100 held-out samples, half of
    it twice as many."""
    max_copy_rate: float = Field(0.01, ge=0, lt=1)
    """Share of copies, beyond false alarms, that does not fail the run."""
    max_exact: int = Field(0, ge=0)
    """Samples that may be the same picture as a training sample, up to flips, shifts and noise."""
    num_bootstrap: int = Field(200, ge=20)
    """Draws of patients behind the intervals of distances."""
