"""The model card: what goes with a model when it is shared, in the form that model hubs read."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import escape

from facecls.analysis.scores import Interval, scores_of
from facecls.analysis.tables import parts
from facecls.data.sources import roots_of
from facecls.data.split import split_files, split_seed_of
from facecls.files import replacing
from facecls.report.blocks import Block, Bullets, Content, Section, score_interval
from facecls.report.template import environment
from facecls.run import BEST_CHECKPOINT, CARD, Run

_UTKFACE = "https://susanqq.github.io/UTKFace/"
_HUB_METRICS = {"f1_macro": "f1", "mae_years": "mae"}
"""What hubs call scores; others keep their names."""
_UNKNOWN = "unknown"


def write_card(run: Run, scores: Mapping[str, Interval], verdict: Sequence[Block], limits: Section) -> Path:
    """Writes ``model_card.md``: Markdown after a block of YAML, as https://huggingface.co/docs/hub/model-cards says.

    Args:
        run: The run.
        scores: As ``analysis.scores.score`` returns them.
        verdict: As ``sections.verdict.verdict`` returns it.
        limits: As ``sections.limits.limits`` returns it.

    Returns:
        Path of the card.

    Raises:
        UserError: If it can't be written.
    """
    front = yaml.safe_dump(_front_matter(run, scores), sort_keys=False, allow_unicode=True, width=120)
    rows = [
        [_markdown(scores_of(run.tasks)[name].heading), _interval(run, name, interval), f"{interval.faces:,}"]
        for name, interval in scores.items()
    ]
    text = environment(escapes=False).get_template("model_card.md.j2").render(
        front=front,
        name=_markdown(run.name),
        model={name: _markdown(value) for name, value in _model(run).items()},
        data={name: _markdown(value) for name, value in _data(run).items()},
        scores=rows,
        verdict=list(map(_markdown, _items(verdict))),
        limits=list(map(_markdown, _items(limits.blocks))),
        terms=list(map(_markdown, _terms(run))),
        checkpoint=BEST_CHECKPOINT if (run.folder / BEST_CHECKPOINT).is_file() else "best.ckpt",
        is_drawn=run.is_drawn,
    )  # fmt: skip
    dest = run.folder / CARD
    with replacing(dest) as part:
        part.write_text(text, encoding="utf-8")
    return dest


def _front_matter(run: Run, scores: Mapping[str, Interval]) -> dict[str, Any]:
    """What hubs read; a licence is named only where the run knows all that it depends on."""
    licence: dict[str, str] = {"license": _UNKNOWN}
    if _is_trained_on_utkface(run):
        licence = {"license": "other", "license_name": "non-commercial-research", "license_link": _UTKFACE}
    predicted = [name for name in run.tasks if f"{name}_predicted" in run.predictions]
    data: dict[str, str] = (
        {"name": "UTKFace", "type": "utkface"} if run.is_utkface else {"name": _source(run), "type": _UNKNOWN}
    )
    results: list[dict[str, Any]] = []
    for name in predicted:
        measured = [
            {"type": _hub_metric(score), "value": round(interval.value, 4), "name": scores_of(run.tasks)[score].heading}
            for score, interval in scores.items()
            if scores_of(run.tasks)[score].task.name == name
        ]
        if measured:
            task = {"type": "image-classification", "name": run.tasks[name].title}
            results.append({"task": task, "dataset": data | {"split": "test"}, "metrics": measured})
    return {
        **licence,
        "library_name": "facecls",
        "pipeline_tag": "image-classification",
        "tags": ["face-attributes", *predicted],
        **({"datasets": ["UTKFace"]} if _is_trained_on_utkface(run) else {}),
        "metrics": list(dict.fromkeys(map(_hub_metric, scores))),
        **({"model-index": [{"name": run.name, "results": results}]} if results else {}),
    }


def _hub_metric(score: str) -> str:
    name = score.rsplit("/", 1)[-1]
    return _HUB_METRICS.get(name, name)


def _model(run: Run) -> dict[str, str]:
    options, metrics = _model_options(run), run.metrics
    weights = options.get("weights", _UNKNOWN)
    seen = f"{metrics['faces_seen']:,}" if "faces_seen" in metrics else _UNKNOWN
    if run.config.get("probe") is True:
        seen = "those of the training part once, since the trunk did not learn"
    return {
        "Trunk": str(options.get("trunk", _UNKNOWN)),
        "Weights it started from": ("random" if weights is None else str(weights))
        + (f", heads of {heads}" if isinstance(heads := run.config.get("heads"), str) else ""),
        "Image size": f"{run.data['image_size']} pixels" if "image_size" in run.data else _UNKNOWN,
        "Faces seen in training": seen,
        "Device": str(metrics.get("device", _UNKNOWN)),
        "facecls": f"{metrics.get('version', _UNKNOWN)}, commit {metrics.get('git_commit') or _UNKNOWN}",
    }


def _data(run: Run) -> dict[str, str]:
    files = split_files(run.data.get("split_file"))
    seed = split_seed_of(run.data, run.config.get("seed_everything"))
    sizes = ", ".join(
        f"{size:,} {name}" for name, size in parts(run.predictions if run.faces is None else run.faces).items()
    )
    return {
        "Source": _source(run),
        "Faces": sizes,
        "Split": " and ".join(files) or (_UNKNOWN if seed is None else f"by facecls, seed {seed}"),
        "Labels": "; ".join(f"{task.title.lower()}: {task.expected}" for task in run.tasks.values()),
    }


def _terms(run: Run) -> Iterator[str]:
    """The terms of what the model was made from, as far as the run knows them."""
    if _is_trained_on_utkface(run):
        yield f"Faces: UTKFace is for non-commercial research only ({_UTKFACE}), and so are models trained on it."
    elif len(run.train) and run.is_drawn:
        yield "Faces: drawn by facecls (MIT)."
    else:
        yield "Faces: their terms are not known to the run; they apply to the model."
    options = _model_options(run)
    source = f"{options.get('trunk')} {options.get('weights')}"
    if "weights" in options and options["weights"] is None:
        yield "Trunk: it started from random weights."
    elif "vggface2" in source.lower():
        yield "Trunk: by its name it learnt VGGFace2, whose faces are for non-commercial research only."
    else:
        yield "Trunk: the terms of the weights that it started from are not known to the run; they apply to the model."
    yield "facecls itself: MIT."


def _is_trained_on_utkface(run: Run) -> bool:
    return run.is_utkface and len(run.train) > 0


def _source(run: Run) -> str:
    roots = roots_of(run.data.get("root", _UNKNOWN))
    return " and ".join(root if root == _UNKNOWN else Path(root).name for root in roots)


def _model_options(run: Run) -> dict[str, Any]:
    options = run.config.get("model")
    return options if isinstance(options, dict) else {}


def _items(blocks: Sequence[Block]) -> Iterator[Content]:
    for block in blocks:
        if isinstance(block, Bullets):
            yield from block.items


def _interval(run: Run, name: str, interval: Interval) -> str:
    unit = scores_of(run.tasks)[name].unit
    return _markdown(score_interval(name, interval.value, interval.low, interval.high, unit))


def _markdown(content: Content) -> str:
    """A text of the page without its elements, in which nothing is markup."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", escape(content).striptags())
