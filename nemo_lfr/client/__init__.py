"""Python clients of `nemo-lfr serve`.

    with Client("http://127.0.0.1:8000") as client, client.decode_stream(ramp=(1, 2, 4)) as stream:
        for frame in frames:
            play(stream.push(frame))
        play(stream.flush())

The methods of `Client` block, and `AsyncClient` is for asyncio. Both clients run without PyTorch. Streams need the
package `websockets`.

The clients validate every answer of the server and count the results, so a faulty server causes a `ServerError`, and
never an incomplete or invalid result. A server that makes no progress for `timeout` seconds causes a
`ServerLostError`.

If the connection of a stream is lost, the stream's methods raise `ServerLostError`. Open another stream, and send the
recording again. With `retry_s`, a client keeps trying for that many seconds to open a stream or to send a request.
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
