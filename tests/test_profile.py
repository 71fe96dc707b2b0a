"""``monitor.profile_step``."""

import json

from training_parts import launch, recipe, train, write_shards


def marks(run) -> dict[str, list[str]]:
    """Marked steps of each trace."""
    found = {}
    for path in (run / "profile").iterdir():
        events = json.loads(path.read_text())["traceEvents"]
        named = sorted((e["ts"], e["name"]) for e in events if e.get("cat") == "user_annotation")
        found[path.name] = [name for _, name in named if name.startswith("training step")]
    return found


def test_three_steps_are_traced_or_what_is_left_of_the_run(tmp_path):
    shards = write_shards(tmp_path / "shards")
    for steps, traced in ((7, (3, 4, 5)), (4, (3, 4))):
        run = tmp_path / f"run{steps}"
        values = recipe(run, shards, training__steps=steps, monitor__profile_step=3)
        launch(train, (values,), 2, tmp_path / f"log{steps}")
        assert marks(run) == {"step_00000003.json": [f"training step {step}" for step in traced]}
