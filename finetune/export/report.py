"""An export's report as Markdown and JSON."""

from __future__ import annotations

import json
import math
from typing import Any


def as_markdown(report: dict[str, Any]) -> str:
    """The report as one table, and what it says in words."""
    head = [
        "",
        "size",
        "load",
        "perplexity",
        "KL mean",
        "KL 99%",
        "top-1",
        "answers equal",
        "they stop",
        "token ids",
    ]
    head.append("compared with")
    lines = [f"# {report['title']}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    files = [found for found in report["models"] if found.get("dtype") == "gguf"]
    for found in report["models"]:
        if found in files:
            continue
        if "error" in found:
            lines.append(f"| {found['name']} | {_size(found['bytes'])} | {found['error']} |" + " |" * 8)
            continue
        count = len(found["answers"])
        cells = [
            found["name"],
            _size(found["bytes"]),
            f"{found['load_seconds']:.1f} s",
            f"{found['perplexity']:.4g}",
            _number(found.get("kl")),
            _number(found.get("kl_p99")),
            _number(found.get("top1"), ".2%"),
            f"{found['answers_equal']} of {count}" if "answers_equal" in found else "",
            f"{found['stopped']} of {count}",
            f"{found['conversations_equal']} of {len(found['conversations'])}"
            if "conversations_equal" in found
            else "",
            found["against"] or "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += _gguf_table(files) if files else []
    lines += ["", *report["notes"]]
    if report["missed"]:
        lines += ["", "It falls short:", "", *(f"- {line}" for line in report["missed"])]
    return "\n".join(lines) + "\n"


def _gguf_table(files: list[dict[str, Any]]) -> list[str]:
    """GGUF files as llama.cpp has measured them, by language; one that was not kept is in parentheses."""
    languages = sorted({name for found in files for name in found.get("groups", {})})
    head = ["GGUF", "size", "perplexity", "KL mean", "KL 99%", "top-1"]
    head += [f"KL {name}" for name in languages]
    head += ["they stop", "token ids", "prompts", "tokens/s, prompt", "answer"]
    lines = ["", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for found in files:
        name = found["name"].removeprefix("gguf:")
        name = name if found["kept"] else f"({name})"
        if "error" in found:
            lines.append(f"| {name} | {_size(found['bytes'])} | {found['error']} |" + " |" * (len(head) - 3))
            continue
        cells = [
            name,
            _size(found["bytes"]),
            f"{found['perplexity']:.4g}",
            _number(found.get("kl")),
            _number(found.get("kl_p99")),
            _number(found.get("top1"), ".2%"),
            *(_number(found["groups"].get(language, {}).get("kl")) for language in languages),
            f"{found['stopped']} of {len(found['answers'])}",
            *(_of(found.get(key)) for key in ("same_texts", "same_prompts")),
            f"{found['prompt_speed']:,.0f}",
            f"{found['speed']:,.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    against = next((found["against"] for found in files if found.get("against")), "")
    lines += ["", f"GGUF files are measured by llama.cpp, against {against}; in parentheses: not kept."]
    return lines


def _of(same: dict[str, Any] | None) -> str:
    return f"{same['equal']} of {same['count']}" if same and same["count"] else ""


def as_json(report: dict[str, Any]) -> str:
    """The report without the texts that were compared; what is not a number is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if k not in ("answers", "conversations")}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(report), ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _number(value: float | None, form: str = ".2g") -> str:
    if value is None or math.isnan(value):
        return "" if value is None else "nan"
    return "< 1e-6" if value < 1e-6 and form == ".2g" else format(value, form)
