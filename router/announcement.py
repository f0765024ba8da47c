"""Tells a controller where this router is, so that the controller's instances report to it."""

import asyncio
import logging

from tandem.core.errors import TandemError
from tandem.core.tls import ClusterTls
from tandem.wire.channels import LastingChannel
from tandem.wire.controller import ControllerClient

log = logging.getLogger(__name__)

_RETRY_S = 1.0
_PER_TERM = 3  # announcements in the time after which one is forgotten


async def announce(controller: str, control: str, token: str | None, tls: ClusterTls | None) -> None:
    """Until cancelled. A controller that is away is tried again for ever."""
    is_known = False
    async with LastingChannel(controller, token, tls) as channel:
        while True:
            try:
                client = ControllerClient(await channel.get())
                pause_s = await client.announce_router(control) / _PER_TERM
                if not is_known:
                    log.info("the controller %s knows this router as %s", controller, control)
                is_known = True
            except TandemError as error:
                if is_known:
                    log.warning("the controller %s cannot be told of this router: %s", controller, error.message)
                is_known, pause_s = False, _RETRY_S
            await asyncio.sleep(pause_s)
