"""Arrays that were sent ahead of the requests that use them, on the disk, each its owner's."""

from __future__ import annotations

import json
import re
import secrets
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from raysynth.errors import InputError
from raysynth.serving.arrays import Sent

UPLOAD_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Upload:
    """What is known of an array.

    Attributes:
        id: random.
        owner: whose token sent it.
        number: of the upload, in the order in which they came.
        shape: of the array.
        dtype: likewise.
        spacing_mm: along each axis, if its file told.
    """

    id: str
    owner: str
    number: int
    shape: tuple[int, ...]
    dtype: str
    spacing_mm: tuple[float, ...] | None


class UploadFolder:
    """Uploads as files, two each; the oldest of an owner make room for new ones."""

    def __init__(self, path: Path, keep: int) -> None:
        """Reads what is there.

        Args:
            path: the folder; it is made.
            keep: uploads of one owner that are kept.
        """
        self.path, self.keep = path, keep
        self._lock = threading.Lock()
        path.mkdir(parents=True, exist_ok=True)
        found = [json.loads(file.read_text()) for file in path.glob("*.json")]
        uploads = sorted((Upload(**one) for one in found), key=lambda one: one.number)
        self._uploads = {one.id: one for one in uploads}

    def add(self, owner: str, sent: Sent, in_use: frozenset[str] = frozenset()) -> Upload:
        """Keeps an array.

        Args:
            owner: whose it is.
            sent: the array.
            in_use: ids that must stay, whatever their age.
        """
        with self._lock:
            number = max((one.number for one in self._uploads.values()), default=0) + 1
            values = sent.values
            upload = Upload(
                secrets.token_hex(16),
                owner,
                number,
                values.shape,
                str(values.dtype),
                sent.spacing_mm,
            )
            np.save(self._array(upload.id), values, allow_pickle=False)
            (self.path / f"{upload.id}.json").write_text(json.dumps(asdict(upload)))
            self._uploads[upload.id] = upload
            own = [one for one in self._uploads.values() if one.owner == owner]
            for old in own[: max(0, len(own) - self.keep)]:
                if old.id not in in_use:
                    del self._uploads[old.id]
                    self._array(old.id).unlink(missing_ok=True)
                    (self.path / f"{old.id}.json").unlink(missing_ok=True)
        return upload

    def read(self, owner: str, upload_id: str, field: str) -> Sent:
        """An owner's array.

        Raises:
            InputError: there is none; its first word is the field that named it.
        """
        upload = self._uploads.get(upload_id) if UPLOAD_ID.fullmatch(upload_id) else None
        if upload is None or upload.owner != owner:
            raise InputError(f"{field}: there is no such upload of yours; send it again")
        values = np.load(self._array(upload.id), allow_pickle=False)
        return Sent(values, upload.spacing_mm)

    def _array(self, upload_id: str) -> Path:
        return self.path / f"{upload_id}.npy"
