"""Prepares what S3PRL needs beside the data: paths in its settings, lists of lengths, vocabularies, lists of sessions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hubert_eff.utils.files import write_json, write_text

from ..tasks import Task
from . import layouts


def prepare(task: Task, config: dict[str, Any], data: Path, folder: Path) -> dict[str, Any]:
    """Add the paths of the data to the configuration, and write the lists and vocabularies that S3PRL needs to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    data, folder = data.resolve(), folder.resolve()
    expert, root = config["downstream_expert"], data / task.source.folders[0]
    if task.name == "asr":
        characters = "".join(f"{c} 1\n" for c in f"|{layouts.CHARACTERS}")  # a fairseq dictionary: symbols and counts
        write_text(folder / "char.dict", characters)
        _write_lengths(root, folder)
        expert["datarc"] |= {"libri_root": str(root), "bucket_file": str(folder), "dict_path": str(folder / "char.dict")}
    elif task.name == "ks":
        expert["datarc"] |= {f"speech_commands_{key}": str(data / name) for key, name in zip(("root", "test_root"), task.source.folders)}
    elif task.name == "sf":
        text = "".join(layouts.snips(root).values()).replace("\t", "")
        _write_vocabulary(folder / "characters.txt", {*text, *layouts.CHARACTERS, " "})
        expert["corpus"]["path"] = str(root)
        expert["text"] |= {"vocab_file": str(folder / "characters.txt"), "slots_file": str(root / layouts.SNIPS_SLOTS)}
    elif task.name == "pr":
        files = sorted(root.glob(layouts.LEXICONS))
        _write_vocabulary(folder / "phones.txt", {phone for phones in layouts.lexicon(files).values() for phone in phones})
        expert["corpus"] |= {"path": str(root), "lexicon": [str(file) for file in files]}
        expert["text"]["vocab_file"] = str(folder / "phones.txt")
    elif task.name == "sid":
        expert["datarc"] |= {"file_path": str(root), "meta_data": str(root / layouts.SPEAKER_LIST)}
    elif task.name == "asv":
        expert["datarc"] |= {f"{part}_meta_data": str(root / layouts.TRIAL_LIST) for part in ("train", "dev", "test")}
        expert["datarc"]["file_path"] = str(root)
    elif task.name == "ic":
        expert["datarc"]["file_path"] = str(root)
    elif task.name == "qbe":
        expert["datarc"]["dataset_root"] = str(root)
    elif task.name == "sd":
        expert["loaderrc"] |= {f"{split}_dir": str(root / split) for split in ("train", "dev", "test")}
    elif task.name == "er":
        _write_sessions(root, folder)
        expert["datarc"] |= {"root": str(root), "meta_data": str(folder)}
    return config


def _write_lengths(root: Path, folder: Path) -> None:
    """A list per split of LibriSpeech of its recordings and their samples, as `preprocess/generate_len_for_bucket.py` of S3PRL makes it."""
    import soundfile as sf

    for split in layouts.LIBRISPEECH_SPLITS:
        files = sorted((root / split).glob("*/*/*.flac"))
        rows = sorted(((sf.info(file).frames, str(file.relative_to(root))) for file in files), reverse=True)
        write_text(folder / f"{split}.csv", "file_path,length\n" + "".join(f"{name},{length}\n" for length, name in rows))


def _write_vocabulary(file: Path, symbols: Iterable[str]) -> None:
    write_text(file, "".join(f"{symbol}\n" for symbol in sorted(symbols)))


def _write_sessions(root: Path, folder: Path) -> None:
    """The lists of IEMOCAP by S3PRL's own preprocessing, in an order that does not depend on the file system."""
    from s3prl.downstream.emotion.IEMOCAP_preprocess import preprocess

    for session in layouts.SESSIONS:
        (folder / session).mkdir(exist_ok=True)
        for name, sessions in (("train", [other for other in layouts.SESSIONS if other != session]), ("test", [session])):
            file = folder / session / f"{name}_meta_data.json"
            preprocess(str(root), sessions, str(file))
            content = json.loads(file.read_text(encoding="utf-8"))
            for entry in content["meta_data"]:
                entry["path"] = entry["path"][entry["path"].rindex("Session") :]  # a folder above may be named so, too
            content["meta_data"].sort(key=lambda entry: entry["path"])
            write_json(file, content)
