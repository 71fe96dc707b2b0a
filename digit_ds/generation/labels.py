"""Which class each picture of a sampling job shows: labels, folders of given pictures, ``--classes``; all by name."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from digit_ds.errors import UserError
from digit_ds.generation.sources import ImageFolder, Source
from digit_ds.model.spec import TransformerSpec
from digit_ds.settings import brief

FEW_CLASSES, FEW_OF_EACH = 16, 4
"""Default number of pictures: a grid to look at."""


def choose_labels(
    model: Path | str,
    spec: TransformerSpec,
    provenance: Mapping[str, Any],
    source: Source | None,
    count: int | None,
    per_class: int | None,
    classes: Sequence[int | str] | None,
) -> tuple[list[int], list[str]]:
    """The label of every picture (-1: none) and the classes' names, in the order of the labels.

    Args:
        model: the first-stage model's directory, for messages.
        provenance: its provenance; ``classes`` are the names of its labels. Published models have none.
        source: given pictures or tokens; the folder of a picture names its class.
        count: number of pictures, classes in turn; or
        per_class: pictures of each class. None of them: 4 of each of the first 16 classes, or 64 without classes.
        classes: labels, or names of classes; for given pictures one for all of them or one for each of their folders
            in sorted order.

    Raises:
        UserError: a class is unknown to the model, or the arguments cannot be combined.
    """
    names = [str(name) for name in provenance.get("classes") or []]
    if source is not None:
        if per_class is not None:
            raise UserError(
                "per_class is given for given pictures or tokens, expected count or none (--per-class, --count)"
            )
        labels, shown = _given(model, spec, names, source, classes)
        return labels[: count or None], shown
    if not spec.classes:
        if classes is not None or per_class is not None:
            raise UserError(f"{model}: is unconditional, but classes are given, expected none (--classes, --per-class)")
        return [-1] * (FEW_CLASSES * FEW_OF_EACH if count is None else count), []
    if count is None and per_class is None:
        per_class = FEW_OF_EACH
        classes = range(min(spec.classes, FEW_CLASSES)) if classes is None else classes
    chosen = list(range(spec.classes)) if classes is None else [_label(model, spec, names, one) for one in classes]
    if not chosen or (count is None) == (per_class is None):
        raise UserError(
            f"classes are {brief(chosen)}, count is {count} and per_class is {per_class}, expected at least one class, "
            "and either a count of pictures or a count per class"
        )
    total = per_class * len(chosen) if per_class is not None else count or 0
    return [chosen[image % len(chosen)] for image in range(total)], names


def labels_of(
    model: Path | str, spec: TransformerSpec, provenance: Mapping[str, Any], classes: Sequence[int | str]
) -> list[int]:
    """The labels of ``classes``, which are labels or names.

    Raises:
        UserError: a class is unknown to the model.
    """
    names = [str(name) for name in provenance.get("classes") or []]
    return [_label(model, spec, names, one) for one in classes]


def _given(
    model: Path | str, spec: TransformerSpec, names: list[str], source: Source, classes: Sequence[int | str] | None
) -> tuple[list[int], list[str]]:
    """Labels of given pictures or tokens: by ``classes``, else by the names of the pictures' folders."""
    folders = source.folders() if isinstance(source, ImageFolder) else [None] * source.count
    distinct = sorted({folder for folder in folders if folder is not None})
    if not spec.classes:  # the folders are only shown beside the pictures
        if classes is not None:
            raise UserError(f"{model}: is unconditional, but classes are given, expected none (--classes, --per-class)")
        shown = names if set(distinct) <= set(names) else distinct
        numbers = {name: label for label, name in enumerate(shown)}
        return [-1 if folder is None else numbers[folder] for folder in folders], shown
    if classes is None:
        known: dict[str | None, int] = {name: label for label, name in enumerate(names)}
    elif len(classes) == 1:
        return [_label(model, spec, names, classes[0])] * source.count, names
    elif len(classes) == len(distinct):
        known = {folder: _label(model, spec, names, one) for folder, one in zip(distinct, classes)}
    else:
        raise UserError(
            f"{len(classes)} classes are given for pictures in {len(distinct)} folders, expected one class for all or "
            "one for each folder in sorted order"
        )
    for image, folder in enumerate(folders):
        if folder not in known:
            what = source.names[image] if isinstance(source, ImageFolder) else "a given image"
            expected = f"the name of a class ({_some(names)}) or --classes" if names else "--classes"
            raise UserError(
                f"{model}: is class-conditional, but the class of {what} is unknown "
                f"({'no folder' if folder is None else f'folder {folder!r}'}), expected {expected}"
            )
    return [known[folder] for folder in folders], names


def _label(model: Path | str, spec: TransformerSpec, names: list[str], given: int | str) -> int:
    """A label from itself or from a class name; digits are a label."""
    if isinstance(given, str) and not given.lstrip("-").isdigit():
        if given not in names:
            expected = f"a label 0..{spec.classes - 1}"
            if names:
                near = _near(given, names)
                expected += f" or a name of {len(names)} classes; " + (
                    f"similar: {_some(near)}" if near else f"names: {_some(names)}"
                )
            raise UserError(f"class {given!r} is unknown to {model}, expected {expected}")
        return names.index(given)
    if not 0 <= (label := int(given)) < spec.classes:
        raise UserError(f"class {label} is outside of {model}, expected 0..{spec.classes - 1}")
    return label


def _near(given: str, names: list[str]) -> list[str]:
    """Names that resemble what was given or contain it."""
    folded = {name.casefold(): name for name in reversed(names)}
    near = difflib.get_close_matches(given.casefold(), folded, n=5)
    near += [name for name in folded if given.casefold() in name and name not in near]
    return [folded[name] for name in near]


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
