"""The recipe's store over HTTP: runs and reference samples, for those who may see it."""

# See `raysynth.serving.gateway`: annotations must not be texts.

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Response

from raysynth.config import ExperimentConfig
from raysynth.serving.answers import (
    PICTURES,
    REFUSALS,
    Bearer,
    Name,
    packed_sample,
    wanted_media,
)
from raysynth.serving.arrays import PNG
from raysynth.serving.gallery import (
    RunOut,
    SamplesOut,
    Wanted,
    read_sample,
    reference_page,
    references,
    run_page,
    runs,
)
from raysynth.serving.tokens import Grant, Scope

store_routes = APIRouter()

Row = Annotated[int, Path(ge=0, le=10**9)]


class StoreRoutes:
    """Routes that only read the store."""

    config: ExperimentConfig

    def _admitted(self, bearer: Bearer, *scopes: Scope) -> tuple[str, Grant]:
        raise NotImplementedError

    @store_routes.get("/v1/runs", responses=REFUSALS)
    async def runs(self, bearer: Bearer = None) -> list[RunOut]:
        """The synthetic runs of the recipe's store."""
        self._admitted(bearer, "store")
        return await asyncio.to_thread(runs, self.config)

    @store_routes.get("/v1/runs/{run}/samples", responses=REFUSALS)
    async def run_samples(
        self, run: Name, wanted: Annotated[Wanted, Query()], bearer: Bearer = None
    ) -> SamplesOut:
        """A page of a run's samples, without their pixels."""
        self._admitted(bearer, "store")
        return await asyncio.to_thread(run_page, self.config, run, wanted)

    @store_routes.get("/v1/runs/{run}/samples/{row}", responses=PICTURES, response_class=Response)
    async def run_sample(
        self, run: Name, row: Row, accept: Annotated[str, Header()] = PNG, bearer: Bearer = None
    ) -> Response:
        """A sample of a run: a PNG in the lung window, an NPZ in HU with its layout, a NIfTI."""
        self._admitted(bearer, "store")
        return await self._stored(f"synthetic/{run}", row, accept)

    @store_routes.get("/v1/references", responses=REFUSALS)
    async def references(self, bearer: Bearer = None) -> RunOut:
        """The recipe's sample set: real samples, or what stands for them."""
        self._admitted(bearer, "store")
        return await asyncio.to_thread(references, self.config)

    @store_routes.get("/v1/references/samples", responses=REFUSALS)
    async def reference_samples(
        self, wanted: Annotated[Wanted, Query()], bearer: Bearer = None
    ) -> SamplesOut:
        """A page of reference samples, without their pixels."""
        self._admitted(bearer, "store")
        return await asyncio.to_thread(reference_page, self.config, wanted)

    @store_routes.get("/v1/references/samples/{row}", responses=PICTURES, response_class=Response)
    async def reference_sample(
        self, row: Row, accept: Annotated[str, Header()] = PNG, bearer: Bearer = None
    ) -> Response:
        """A reference sample: a PNG in the lung window, an NPZ in HU with its layout, a NIfTI."""
        self._admitted(bearer, "store")
        return await self._stored("samples", row, accept)

    async def _stored(self, path: str, row: int, accept: str) -> Response:
        def read() -> Response:
            found: dict[str, Any] = read_sample(self.config, path, row)
            media = wanted_media(accept, PNG)
            return packed_sample(media, found["hu"], found["about"], layout=found["layout"])

        return await asyncio.to_thread(read)
