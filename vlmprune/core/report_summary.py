"""A report as plain values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmprune.core.report import Report


def summarise(report: Report) -> dict[str, Any]:
    """A report as plain values for JSON."""
    return {
        "model": report.model_class,
        "policy": report.policy,
        "visual_tokens": list(report.visual_tokens),
        "kept_tokens": list(report.kept_tokens),
        "mean_kept_layers": report.mean_kept_layers,
        "layers_used": report.layers_used,
        "tower_sites": [record.summary() for record in report.tower_sites],
        "tower_attended": list(report.tower_attended),
        "tower_passed": list(report.tower_passed),
        "tower_flops": report.tower_flops,
        "tower_flops_dense": report.tower_flops_dense,
        "sites": [record.summary() for record in report.sites],
        "lengths_per_layer": list(report.lengths_per_layer),
        "decoder_flops": report.decoder_flops,
        "decoder_flops_dense": report.decoder_flops_dense,
        "kv_bytes": report.kv_bytes,
        "kv_bytes_dense": report.kv_bytes_dense,
        "kv_bytes_per_layer": None if report.kv_bytes_per_layer is None else list(report.kv_bytes_per_layer),
        "geometry": report.geometry,
        "warnings": report.warnings,
    }
