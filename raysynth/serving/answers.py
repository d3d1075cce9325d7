"""What routes share: who asks, how refusals look, and a sample as a client wants it."""

# Ray Serve copies the routes' functions: annotations that they use must not be texts.

import json
from typing import Annotated, Any

from fastapi import Header, HTTPException, Path, Response, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from raysynth.export.passport import sealed
from raysynth.serving.arrays import DICOM, NIFTI, NPZ, PNG, dicom_of, nifti_of, npz_of, png_of
from raysynth.serving.schemas import Problem

Problems = dict[int | str, dict[str, Any]]
REFUSALS: Problems = {
    code: {"model": Problem} for code in (400, 401, 403, 404, 409, 413, 422, 429, 503)
}
PICTURES: Problems = REFUSALS | {200: {"content": {PNG: {}, NPZ: {}, NIFTI: {}, DICOM: {}}}}

Bearer = Annotated[HTTPAuthorizationCredentials | None, Security(HTTPBearer(auto_error=False))]
IdempotencyKey = Annotated[str | None, Header(max_length=200)]
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
Name = Annotated[str, Path(pattern=NAME)]


def event(name: str, data: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def wanted_media(accept: str, default: str) -> str:
    """The first media type that a client takes and we have."""
    for media in accept.lower().split(","):
        name = media.partition(";")[0].strip()
        if name in (PNG, NPZ, NIFTI, DICOM):
            return name
    return default


def packed_sample(media: str, hu: Any, about: dict[str, Any], **more: Any) -> Response:
    """A sample as a client wants it; headers and file say whether it is synthetic.

    Args:
        media: its type.
        hu: the sample.
        about: what is known of it.
        more: arrays that an NPZ holds beside it.
    """
    told = {"Seed": "seed", "Bundle": "bundle", "Batch-Shape": "batch_shape"}
    headers = {f"X-Raysynth-{name}": str(about[key]) for name, key in told.items() if key in about}
    headers["X-Raysynth-Synthetic"] = "yes" if about["synthetic"] else "no"
    passport = about if about["synthetic"] else None
    if media == PNG:
        content = png_of(hu, about["window_hu"], passport)
    elif media == DICOM:
        if passport is None or about["intensity"] != "hu":
            raise HTTPException(406, "DICOM is made of synthetic samples in Hounsfield units alone")
        content = dicom_of(hu, (about["depth_mm"], about["pixel_mm"]), passport)
    elif media == NIFTI:
        spacing_mm = (about["depth_mm"], about["pixel_mm"])
        is_mixed = about["copied_fraction"] > 0 if about["synthetic"] else None
        content = nifti_of(hu, spacing_mm, is_mixed, passport)
    else:
        content = npz_of(hu, about if passport is None else sealed(about, "image", hu), **more)
    return Response(content, media_type=media, headers=headers)
