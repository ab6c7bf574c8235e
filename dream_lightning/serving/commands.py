"""The command `serve`."""

import os
import signal
from typing import Any, Literal, NoReturn

from jsonargparse import ArgumentParser

from dream_lightning.errors import UserError, check_range
from dream_lightning.viewer.commands import open_model, parse


def serve(parser: ArgumentParser, arguments: list[str]) -> None:
    """Serve a model as OpenAI's API does, with a page to chat."""
    try:
        from dream_lightning.serving.server import KEY, make_server
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'dream-lightning[serve]'") from error
    hosts = Literal["127.0.0.1", "0.0.0.0", "::"]
    parser.add_argument("--host", type=hosts, default="127.0.0.1", help="127.0.0.1: this machine only; 0.0.0.0: any")
    parser.add_argument("--port", type=int, default=8000, help="TCP port of the server")
    options, opened, given = parse(parser, arguments, open_model, make_server, skip={"opened"})
    check_range("port", options.port, least=1024, most=65535)
    if options.host != "127.0.0.1" and not os.environ.get(KEY):
        print(f"anybody who reaches this machine can use the model: set {KEY} to ask for a key", flush=True)
    server = make_server(opened, **given)
    print(f"starting: http://{options.host}:{options.port} (page), …/v1 (OpenAI's API), …/metrics", flush=True)
    main = os.getpid()

    def end(*_: Any) -> NoReturn:  # LitServe ends the workers at a KeyboardInterrupt; the HTTP process inherits this
        raise KeyboardInterrupt if os.getpid() == main else SystemExit

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(options.host, options.port, num_api_servers=1, log_level="warning", generate_client_file=False)
    except RuntimeError as error:
        if "failed to start" not in str(error):
            raise
        raise UserError("a worker could not load the model: its error is above") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
