"""Python clients of `nemo-lfr serve`.

    with Client("http://127.0.0.1:8000") as client, client.decode_stream(ramp=(1, 2, 4)) as stream:
        for frame in frames:
            play(stream.push(frame))
        play(stream.flush())

`Client` blocks; `AsyncClient` is for asyncio. Neither imports PyTorch. Streams need the package `websockets`.

The server holds the state of a stream, so a lost stream cannot be resumed: its methods raise `ServerLostError`, and
the caller opens another one. With `retry_s`, a client retries what can be repeated: opening a stream, and files.
"""

from nemo_lfr.client.asynchronous import AsyncClient, AsyncDecodeStream, AsyncEncodeStream
from nemo_lfr.client.blocking import Client, DecodeStream, EncodeStream
from nemo_lfr.client.files import EncodedFile, ServerInfo

__all__ = [
    "AsyncClient",
    "AsyncDecodeStream",
    "AsyncEncodeStream",
    "Client",
    "DecodeStream",
    "EncodeStream",
    "EncodedFile",
    "ServerInfo",
]
