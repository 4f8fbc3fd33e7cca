"""What the kernel tells of itself, as tables and lines for people.  Pure: rows in, text out."""

import datetime
from collections.abc import Mapping, Sequence

from llmproto.data import DataColumn, DataReport
from llmproto.jobs import JobRow
from llmproto.models import DeploymentRow, ModelRow
from llmproto.operation import ProcessRow, Status, ThreadRow
from llmproto.tenants import KeyRow
from llmproto.versions import VersionRow
from rich.table import Table

from libllm.cli.output import duration, size, table

CLASSES = ("interactive", "normal", "batch", "background")


def processes(rows: Sequence[ProcessRow]) -> Table:
    """`llmos ps`."""
    return table(
        ("NAME", "PID", "STATE", "INC", "UPTIME", "LEASE", "THR", "DOING"),
        [
            (
                row.name,
                "-" if row.pid is None else str(row.pid),
                row.state.value,
                str(row.incarnation),
                duration(row.uptime_ms),
                _lease(row),
                str(row.threads) if row.threads else "-",
                " ".join(part for part in (row.model, row.path, row.doing) if part),
            )
            for row in rows
        ],
        right="PID INC UPTIME THR",
    )


def threads(rows: Sequence[ThreadRow]) -> Table:
    """`llmos threads`."""
    return table(
        ("THREAD", "STATE", "MODEL", "TENANT", "TOKENS", "CLASS", "AGE", "ON"),
        [
            (
                row.thread.hex(),
                row.state.value,
                row.model,
                row.tenant,
                f"{row.prompt_tokens}+{row.output_tokens}/{row.output_tokens_max}",
                _class(row.service_class, row.priority),
                duration(row.age_ms),
                row.process or "-",
            )
            for row in rows
        ],
        right="TOKENS",
    )


def models(rows: Sequence[ModelRow]) -> Table:
    """`llmos models`."""
    return table(
        ("NAME", "STATE", "CONTEXT", "WEIGHTS", "TASK", "THR", "DETAIL"),
        [
            (
                row.model.name + ("*" if row.default else ""),
                row.state.value,
                str(row.model.context_tokens),
                size(row.model.weight_bytes),
                "chat" if row.model.chat else row.model.task,
                str(row.threads),
                row.detail or row.path,
            )
            for row in rows
        ],
        right="CONTEXT WEIGHTS THR",
    )


def deployments(rows: Sequence[DeploymentRow]) -> Table:
    """`llmos models`: what names serve."""
    return table(
        ("DEPLOYED", "STATE", "SERVES", "BEFORE", "READY", "DEVICE", "SINCE", "DETAIL"),
        [
            (
                row.name,
                row.state.value,
                (row.serving or "-") + (f" -> {row.model}" if row.serving != row.model else ""),
                row.previous or "-",
                f"{row.replicas_ready}/{row.replicas}",
                row.device or "any",
                _day(row.changed_s),
                row.detail,
            )
            for row in rows
        ],
        right="READY",
    )


def versions(rows: Sequence[VersionRow], deployed: Sequence[DeploymentRow]) -> Table:
    """`llmos models`: what is in the store, the newest first."""
    names: dict[str, list[str]] = {}
    for deployment in deployed:
        names.setdefault(deployment.serving or "", []).append(deployment.name)
    references = {row.version: row.reference for row in rows}
    return table(
        ("VERSION", "TAGS", "DEPLOYED", "SIZE", "OWN", "PARENT", "CREATED", "METRICS"),
        [
            (
                row.reference,
                " ".join(row.tags) or "-",
                " ".join(names.get(row.reference, ())) or "-",
                size(row.bytes),
                size(row.bytes_own),
                _parent(row, references),
                _day(row.created_s),
                " ".join(f"{name} {value:.4g}" for name, value in sorted(row.metrics.items())),
            )
            for row in rows
        ],
        right="SIZE OWN",
    )


def _parent(row: VersionRow, references: Mapping[bytes, str]) -> str:
    parent = row.lineage.parent
    return "-" if parent is None else references.get(parent, f"@{parent.hex()[:8]}")


def jobs(rows: Sequence[JobRow]) -> Table:
    """`llmos jobs`."""
    return table(
        ("JOB", "KIND", "NAME", "STATE", "STEP", "SAVED", "TRY", "CLASS", "AGE", "DETAIL"),
        [
            (
                row.job.hex(),
                row.kind.value,
                row.name,
                row.state.value,
                f"{row.step}/{row.steps_total}" if row.steps_total else str(row.step),
                str(row.checkpoint_step) if row.checkpoint is not None else "-",
                str(row.attempts),
                _class(row.service_class, row.priority),
                duration(row.age_ms),
                _job_detail(row),
            )
            for row in rows
        ],
        right="STEP SAVED TRY AGE",
    )


def data_report(report: DataReport) -> list[str]:
    """`llmos data ...`: what came of it."""
    lines = [f"{report.format}: {report.rows_in} rows in, {report.rows_out} out"]
    if report.tokens is not None:
        lines[0] += f", {report.tokens} tokens"
    lines += [f"  dropped  {count:>8}  {why}" for why, count in sorted(report.dropped.items())]
    lines += [f"  changed  {count:>8}  {what}" for what, count in sorted(report.changed.items())]
    lines += [f"  bad      {line}" for line in report.bad]
    lines += [f"  example  {example}" for example in report.examples]
    return lines


def columns(rows: Sequence[DataColumn]) -> Table:
    """The columns of data, as `inspect` found them."""
    return table(
        ("COLUMN", "TYPE", "MISSING", "CHARACTERS", "VALUES"),
        [
            (
                row.name,
                row.type,
                str(row.missing),
                " ".join(map(str, row.characters)) or "-",
                ", ".join(f"{value} ({count})" for value, count in row.values.items()) or "-",
            )
            for row in rows
        ],
        right="MISSING",
    )


def keys(rows: Sequence[KeyRow]) -> Table:
    """`llmos keys list`."""
    return table(
        ("NAME", "RIGHTS", "CREATED"),
        [
            (row.name, "operator" if row.operator else "use", _day(row.created_s))
            for row in sorted(rows, key=lambda row: row.name)
        ],
    )


def status(found: Status, home: str) -> list[str]:
    """`llmos status`: health in a few lines."""
    waits = f" ({'; '.join(found.not_ready)})" if found.not_ready else ""
    lines = [
        f"llmos {found.version}: {'ready' if found.ready else 'not ready'}{waits}",
        f"  home       {home}",
        f"  http       {found.http or 'not listening'}",
        f"  model      {found.default_model or 'none by default'}",
        f"  kernel     epoch {found.kernel_epoch}, up {duration(found.uptime_ms)}, "
        f"{found.sessions} sessions",
        f"  threads    {found.threads_running} running, {found.threads_queued} queued, "
        f"{found.threads_ended} ended",
        f"  tokens     {found.tokens_committed} since this kernel started",
        f"  journal    {size(found.journal_bytes)}"
        + (": FULL, nothing is admitted; make room on its disk" if found.journal_full else ""),
    ]
    lines += [
        f"  device     {device.name}: {device.detail or f'{len(device.cores)} cores'}; "
        f"{size(device.memory_granted_bytes)} of {size(device.memory_bytes)} granted"
        for device in found.devices
    ]
    return lines


def _lease(row: ProcessRow) -> str:
    if row.lease is None:
        return "-"
    return f"{row.lease.device}:{len(row.lease.cores)} {size(row.lease.memory_bytes)}"


def _class(service_class: int, priority: int) -> str:
    name = CLASSES[service_class]
    return f"{name}{priority:+d}" if priority else name


def _job_detail(row: JobRow) -> str:
    if row.error is not None:
        return f"{row.error.value}: {row.detail}"
    parts = [row.doing, row.detail]
    if row.share < 1.0:
        parts.append(f"share {row.share:.0%}")
    if row.version is not None:
        parts.append(f"{row.name}@{row.version.hex()[:8]}")
    parts += [f"{name} {value:.4g}" for name, value in sorted(row.metrics.items())]
    return " ".join(part for part in parts if part)


def _day(seconds: int) -> str:
    return datetime.datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")
