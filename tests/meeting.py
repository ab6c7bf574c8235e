"""Where processes of one group meet. A port found free and then named to them may be taken before they are there."""

from torch.distributed import TCPStore

HOST = "127.0.0.1"


class MeetingPoint:
    """Open as long as this object lives, on a port of its own: processes told by `environment` meet here."""

    def __init__(self) -> None:
        self._store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)

    @property
    def environment(self) -> dict[str, str]:
        """As torchrun, whose agent has opened the port too, tells them."""
        return {"MASTER_ADDR": HOST, "MASTER_PORT": str(self._store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
