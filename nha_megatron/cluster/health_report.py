"""What the health check found: which nodes are broken, which are slow, and one table. Pure: no devices, no ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

# A node below this fraction of the median is named as slow. Sound nodes differ by a few percent in matmul rate (chip and power);
# pairs of nodes differ more, by where they hang in the network.
SLOW_MATMUL = 0.7
SLOW_NETWORK = 0.5
LARGEST_CLOCK_OFFSET_S = 2.0


@dataclass(frozen=True)
class RankReport:
    """What one rank measured. None: not measured."""

    rank: int
    host: str
    device: str = "?"
    error: str | None = None
    """Why the rank cannot take part: no device, a wrong product, a disk that cannot be written, a wrong sum."""
    matmul_tflops: float | None = None
    disk_mb_per_s: float | None = None
    """Written, synced and read back in the run's folder."""
    network_gb_per_s: float | None = None
    """Sent and received at once, to the better of up to two other nodes."""
    clock_offset_s: float | None = None
    """This host's clock minus the median of all."""
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    host: str
    rank: int
    broken: bool
    """A broken node ends the job before it starts; a slow one is only named."""
    text: str

    def __str__(self) -> str:
        return f"{'broken' if self.broken else 'slow'}: node {self.host}, rank {self.rank}: {self.text}"


def judge(reports: Sequence[RankReport]) -> list[Finding]:
    """Everything that is wrong, by rank."""
    findings = [Finding(report.host, report.rank, True, report.error) for report in reports if report.error]
    for report, key, value, usual in _odd_versions(reports):
        findings.append(Finding(report.host, report.rank, True, f"{key} is {value}, on most nodes {usual}"))
    for report in reports:
        if report.clock_offset_s is not None and abs(report.clock_offset_s) > LARGEST_CLOCK_OFFSET_S:
            text = f"its clock is {report.clock_offset_s:+.1f} s off; synchronise it (NTP), or file times and logs mislead"
            findings.append(Finding(report.host, report.rank, False, text))
    for name, attribute, fraction, unit in (
        ("matrix products", "matmul_tflops", SLOW_MATMUL, "TFLOP/s"),
        ("network", "network_gb_per_s", SLOW_NETWORK, "GB/s"),
    ):
        measured = [(report, value) for report in reports if (value := getattr(report, attribute)) is not None]
        middle = median(value for _, value in measured) if measured else 0.0
        for report, value in measured:
            if value < fraction * middle:
                findings.append(Finding(report.host, report.rank, False, f"{name} at {value:.3g} {unit}, the median is {middle:.3g}"))
    return sorted(findings, key=lambda finding: (finding.rank, not finding.broken))


def _odd_versions(reports: Sequence[RankReport]) -> list[tuple[RankReport, str, str, str]]:
    odd = []
    for key in sorted({key for report in reports for key in report.versions}):
        values = Counter(report.versions[key] for report in reports if key in report.versions)
        usual = values.most_common(1)[0][0]
        odd += [(report, key, report.versions[key], usual) for report in reports if report.versions.get(key, usual) != usual]
    return odd


def table(reports: Sequence[RankReport], findings: Sequence[Finding]) -> str:
    """One line a node, with the worst of its ranks in every column."""
    rows = [("node", "ranks", "device", "TFLOP/s", "disk MB/s", "network GB/s", "clock s", "verdict")]
    for host in dict.fromkeys(report.host for report in reports):
        here = [report for report in reports if report.host == host]
        wrong = [finding for finding in findings if finding.host == host]
        verdict = "ok" if not wrong else "broken" if any(finding.broken for finding in wrong) else "slow"
        clocks = [report.clock_offset_s for report in here if report.clock_offset_s is not None]
        rows.append(
            (
                host,
                _ranks([report.rank for report in here]),
                "/".join(dict.fromkeys(report.device for report in here)),
                _worst([report.matmul_tflops for report in here]),
                _worst([report.disk_mb_per_s for report in here]),
                _worst([report.network_gb_per_s for report in here]),
                f"{max(clocks, key=abs):+.2f}" if clocks else "-",
                verdict,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _ranks(ranks: list[int]) -> str:
    return str(ranks[0]) if len(ranks) == 1 else f"{min(ranks)}-{max(ranks)}"


def _worst(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{min(known):.3g}" if known else "-"
