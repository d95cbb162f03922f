"""Versions: immutable, servable models on disk, each with a manifest of everything in it.

    versions/<version>/
      adapter/adapter_config.json, adapter/adapter_model.safetensors    an adapter on the base, PEFT form
      adapter.gguf                        the same tensors for llama.cpp, where the base has a GGUF form
      model/, model.gguf                  instead of these: a whole model, where every weight moved
      evaluation.json, README.md (model card), manifest.json (last)

The last stage of `cycle.py`. `v0` is the base itself and has no directory. A directory without its manifest does not
exist; nothing is ever written into one that has it. By hand, to verify:
`python -m trainer.versions VERSIONS_DIR VERSION`.

Not covered: which version is the champion (the store knows), deleting.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from feedback_store.durable import is_plain_name, new_directory, read_json, sha256_of, write_json
from trainer.base_model import base_provenance
from trainer.errors import VersionDamaged, VersionNotFound
from trainer.finite import non_finite_tensor
from trainer.recipe import CONTINUED_PRETRAINING, DPO, FULL, KTO, LORA, QLORA, SFT, SFT_THEN_DPO
from trainer.runs import Run, summary

MANIFEST = "manifest.json"
_NAME = re.compile(r"v([0-9]+)(?:-practice-[a-z0-9_-]+)?")


@dataclass(frozen=True, slots=True)
class VersionManifest:
    """What a version is made of. `evaluation` is the summary, `files` maps relative paths to hex SHA-256.

    `texts` is the hash of the texts of continued pretraining, or of the dialogues of supervised fine-tuning. What
    older manifests do not have has its default.
    """

    version: str
    base: str
    base_sha256: str | None
    snapshot: str
    recipe: str
    recipe_values: dict[str, Any]
    seed: int
    run_id: str
    practice: str | None
    created_at: str
    evaluation: dict[str, Any]
    verdict: dict[str, Any]
    files: dict[str, str]
    method: str = DPO
    tuning: str = LORA
    texts: str | None = None


class Versions:
    """The directory of versions."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def names(self) -> list[str]:
        """All published versions in the order of their numbers; `v0` is not among them."""
        found = [path.parent.name for path in self.directory.glob(f"v*/{MANIFEST}")]
        return sorted((name for name in found if _NAME.fullmatch(name)), key=_number)

    def load(self, version: str) -> VersionManifest:
        """Raises VersionNotFound, VersionDamaged."""
        if not is_plain_name(version) or not _NAME.fullmatch(version):
            raise VersionNotFound(version)
        try:
            values = read_json(self.directory / version / MANIFEST)
            if values is None:
                raise VersionNotFound(version)
            return VersionManifest(**values)
        except (ValueError, TypeError) as error:
            raise VersionDamaged(
                f"Version {version}: {MANIFEST} cannot be read ({error}). Restore a backup."
            ) from error

    def verify(self, version: str) -> VersionManifest:
        """Re-derive every hash, look for weights that are not finite. Raises VersionNotFound, VersionDamaged."""
        manifest = self.load(version)
        for name, expected in manifest.files.items():
            path = self.directory / version / name
            if not path.is_file():
                raise VersionDamaged(f"Version {version}: {name} is missing. Restore a backup or train again.")
            if sha256_of(path) != expected:
                raise VersionDamaged(f"Version {version}: {name} is not the file that was published. Restore a backup.")
        for name in manifest.files:
            if name.endswith((".safetensors", ".gguf")):
                _require_finite(version, self.directory / version / name)
        return manifest

    def canaries(self, version: str) -> list[dict[str, Any]]:
        """What `canaries.py` recorded of it; none of a version from before there were any. Raises VersionNotFound."""
        self.load(version)
        evaluation = read_json(self.directory / version / "evaluation.json") or {}
        return list(evaluation.get("canaries", []))

    def evaluation(self, version: str) -> dict[str, Any] | None:
        """Its evaluation.json; None where that is missing or cannot be read. Raises VersionNotFound."""
        self.load(version)
        try:
            found = read_json(self.directory / version / "evaluation.json")
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def adapter_gguf(self, version: str) -> Path | None:
        """The file llama-server loads beside the base; None for a base that it cannot serve. Raises VersionNotFound."""
        files = self.load(version).files
        return self.directory / version / "adapter.gguf" if "adapter.gguf" in files else None

    def adapter_directory(self, version: str) -> Path:
        """The adapter in PEFT form. Raises VersionNotFound."""
        self.load(version)
        return self.directory / version / "adapter"

    def model_directory(self, version: str) -> Path | None:
        """The whole model of a version that is none adapter on the base, as a Hugging Face directory; else None."""
        return self.directory / version / "model" if self.load(version).tuning == FULL else None

    def model_gguf(self, version: str) -> Path | None:
        """The whole model as GGUF, where the base has that form; None too for an adapter. Raises VersionNotFound."""
        files = self.load(version).files
        return self.directory / version / "model.gguf" if "model.gguf" in files else None

    def next_name(self, practice: str | None) -> str:
        """The name the next published version gets: v4, or v4-practice-shorter."""
        number = 1 + max((_number(path.name) for path in self.directory.glob("v*")), default=0)
        return f"v{number}" if practice is None else f"v{number}-practice-{practice}"

    def of_run(self, run_id: str) -> str | None:
        """The version a run has published, if it has."""
        return next((name for name in self.names() if self.load(name).run_id == run_id), None)

    def publish(self, run: Run, version: str, verdict: dict[str, Any]) -> str:
        """Publish what a trained and evaluated run made as `version`; publishing a run again changes nothing."""
        published = self.of_run(run.run_id)
        if published is not None:
            return published
        with new_directory(self.directory / version) as directory:
            weights = run.weights
            shutil.copytree(weights, directory / weights.name, copy_function=_link_or_copy)
            if run.config.base["gguf"]:
                _link_or_copy(weights.with_suffix(".gguf"), directory / f"{weights.name}.gguf")
            shutil.copy(run.directory / "evaluation.json", directory / "evaluation.json")
            manifest = _manifest(run, version, verdict, {})
            (directory / "README.md").write_text(model_card(run, manifest), encoding="utf-8")
            write_json(directory / MANIFEST, asdict(_manifest(run, version, verdict, _hashes(directory))))
        return version


def _link_or_copy(source: str | Path, target: str | Path) -> str:
    """Weights are written once and never changed: where the disk can, run and version share them."""
    if Path(source).suffix in (".safetensors", ".gguf"):
        with suppress(OSError):
            os.link(source, target)
            return str(target)
    return str(shutil.copy2(source, target))


def model_card(run: Run, manifest: VersionManifest) -> str:
    """README.md of a version: what it was made from and how it did, for a reader who has nothing else."""
    training, provenance = run.training or {}, _provenance(run)
    snapshot = run.config.snapshot
    licence, is_full = provenance.get("licence"), manifest.tuning == FULL
    sources = ", ".join(f"{count} from {source}" for source, count in snapshot["counts"].items())
    lines = [
        "---",
        f"base_model: {manifest.base}",
        f"library_name: {'transformers' if is_full else 'peft'}",
        *([f"license: {licence}"] if licence else []),
        f"tags: [{manifest.method}, {manifest.tuning}, zephyr-loop]",
        "---",
        "",
        f"# {manifest.version}",
        "",
        f"{_KIND[manifest.tuning]} `{manifest.base}`, learned with {_LEARNED[manifest.method]}.",
    ]
    if manifest.practice:
        lines.append(f"**Practice**: it was taught the taste “{manifest.practice}” on made-up preferences.")
    if provenance.get("dequantized_from"):
        kind = provenance["dequantized_from"]
        lines.append(f"The base weights are dequantized from {kind}; they are not the original weights of the model.")
    lines += [
        "",
        "## Data",
        "",
        f"Snapshot `{manifest.snapshot}`: {_to_learn_from(snapshot)}, "
        f"{snapshot['held_out_rows']} held out ({sources}). Trained on {training.get('pairs')} "
        f"{_ROWS.get(manifest.method, 'pairs')} in "
        f"{training.get('steps')} steps; {training.get('dropped_over_long')} rows with over-long prompts dropped.",
        "",
        "## Recipe",
        "",
        f"`{manifest.recipe}`, seed {manifest.seed}: "
        + ", ".join(f"{key} {value}" for key, value in manifest.recipe_values.items() if key != "about"),
        "",
        f"## Evaluation against {(run.evaluation or {}).get('champion')}",
        "",
        *(f"- {reason}" for reason in manifest.verdict["reasons"]),
        f"- Verdict when it was trained: **{manifest.verdict['decision']}**.",
        "",
        "## Files and licence",
        "",
        ("`model/` is the Hugging Face form" if is_full else "`adapter/` is the PEFT form")
        + (
            f", `{'model' if is_full else 'adapter'}.gguf` the same for llama.cpp. "
            if run.config.base["gguf"]
            else ". "
        )
        + (f"The base is under {licence}. " if licence else "See the base for its licence. ")
        + "The weights carry what the data taught them: the terms of the data apply too.",
        "",
    ]
    return "\n".join(lines)


_KIND = {
    LORA: "A LoRA adapter on",
    QLORA: "A LoRA adapter, learned on the base held in 4 bits, on",
    FULL: "A whole model, every weight moved, from",
}
_LEARNED = {
    DPO: "Direct Preference Optimization",
    SFT: "supervised fine-tuning on good answers",
    SFT_THEN_DPO: "supervised fine-tuning on good answers, then Direct Preference Optimization from there",
    KTO: "KTO on answers that were rated one by one",
    CONTINUED_PRETRAINING: "continued pretraining on the team's own texts",
}
_ROWS = {
    SFT: "good answers",
    SFT_THEN_DPO: "good answers and pairs",
    KTO: "rated answers",
    CONTINUED_PRETRAINING: "blocks of text",
}


def _to_learn_from(snapshot: dict[str, Any]) -> str:
    if texts := snapshot.get("texts"):
        return f"{len(texts['files'])} texts to train on (`{texts['hash']}`)"
    if snapshot.get("rated_rows") is not None:
        return f"{snapshot['rated_rows']} rated answers to train on"
    dialogues = snapshot.get("dialogues")
    files = f" beside {len(dialogues['files'])} files of dialogues (`{dialogues['hash']}`)" if dialogues else ""
    return f"{snapshot['train_rows']} preferences to train on{files}"


def _require_finite(version: str, path: Path) -> None:
    try:
        tensor = non_finite_tensor(path)
    except ImportError:
        return  # without gguf, as where nothing is trained; the other form holds the same tensors
    except (ValueError, LookupError, TypeError) as error:
        raise VersionDamaged(f"Version {version}: {path.name} cannot be read ({error}). Train again.") from error
    if tensor is not None:
        raise VersionDamaged(
            f"Version {version}: {path.name} holds numbers that are not finite, in {tensor}. "
            "It cannot answer: train again."
        )


def _manifest(run: Run, version: str, verdict: dict[str, Any], files: dict[str, str]) -> VersionManifest:
    config, evaluation = run.config, run.evaluation
    assert evaluation is not None
    return VersionManifest(
        version=version,
        base=str(config.base["name"]),
        base_sha256=_provenance(run).get("sha256"),
        snapshot=config.snapshot["hash"],
        recipe=config.recipe_name,
        recipe_values=config.recipe,
        seed=config.seed,
        run_id=run.run_id,
        practice=config.practice,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        evaluation={"champion": evaluation["champion"], **summary(evaluation)},
        verdict=verdict,
        files=files,
        method=config.recipe.get("method", DPO),
        tuning=config.recipe.get("tuning", LORA),
        texts=(config.snapshot.get("texts") or config.snapshot.get("dialogues") or {}).get("hash"),
    )


def _provenance(run: Run) -> dict[str, Any]:
    return base_provenance(Path((run.training or {}).get("base_directory", "")))


def _hashes(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): sha256_of(path) for path in files}


def _number(name: str) -> int:
    match = re.match(r"^v(\d+)", name)
    return int(match[1]) if match else 0


if __name__ == "__main__":
    _found = Versions(Path(sys.argv[1])).verify(sys.argv[2])
    print(f"{_found.version}: {len(_found.files)} files as published on {_found.created_at}")
