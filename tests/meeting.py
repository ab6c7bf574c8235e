"""A port for a process group. A port that was found free may be taken before the processes use it."""

from torch.distributed import TCPStore

HOST = "127.0.0.1"


class MeetingPoint:
    """A store that holds a port open; processes with `environment` use it."""

    def __init__(self) -> None:
        self._store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)

    @property
    def environment(self) -> dict[str, str]:
        """As torchrun sets it, whose agent holds the port too."""
        return {"MASTER_ADDR": HOST, "MASTER_PORT": str(self._store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
