"""Compare the durations in the headers of Opus packets with the time stamps of a container.

FFmpeg decodes as many samples as the header of a packet states. In MP4, CAF and Matroska files,
FFmpeg verifies no checksum, so a damaged header gives audio of another length.
"""

from collections import Counter

# Duration of a frame in milliseconds, by the configuration in the header (RFC 6716, section 3.1).
_FRAME_MS = (*(10, 20, 40, 60) * 3, *(10, 20) * 2, *(2.5, 5, 10, 20) * 4)
_LONGEST = 0.12  # seconds; a longer distance between packets is a pause
_FEW = 8  # with fewer packets of the usual duration, a longer last packet is not an error
_ROUNDING = 0.0015  # seconds; Matroska rounds time stamps to milliseconds


def opus_duration(head: bytes) -> float:
    """Return the duration in seconds that the header of an Opus packet states.

    Args:
        head: first two bytes of the packet, or its only byte.
    """
    count = (1, 2, 2, head[1] & 63 if len(head) > 1 else 0)[head[0] & 3]
    return count * _FRAME_MS[head[0] >> 3] / 1000


class OpusTimes:
    """Time stamps and stated durations of the Opus packets of a track."""

    def __init__(self) -> None:
        self._found: Counter[tuple[float, float]] = Counter()  # of (stated duration, distance to the next packet)
        self._last: tuple[float, float] | None = None  # time stamp and stated duration of the last packet

    def add(self, head: bytes, start: float) -> None:
        """Add a packet.

        Args:
            head: first two bytes of the packet, or its only byte.
            start: time stamp in seconds.
        """
        if self._last is not None and 0 < (distance := start - self._last[0]) <= _LONGEST:
            self._found[self._last[1], round(distance, 4)] += 1
        self._last = start, opus_duration(head)

    def problem(self, end: float | None) -> str | None:
        """Return an error message if headers of packets contradict the time stamps; otherwise None.

        Most packets of a track have the same duration, for example 20 ms. If a header states 60 ms, but the next
        packet follows after 20 ms, the header is wrong. Lost packets, pauses and imprecise time stamps are not errors.

        Args:
            end: end of the audio in seconds, according to the container; None if it is unknown.
        """
        if not self._found or self._last is None:
            return None
        start, stated = self._last
        durations = Counter({stated: 1})
        for (other, _), count in self._found.items():
            durations[other] += count
        usual = durations.most_common(1)[0][0]
        wrong = sum(
            count
            for (other, distance), count in self._found.items()
            if _differ(other, usual) and abs(distance - usual) < abs(distance - other)
        )
        # No packet follows the last one.
        is_constant = not any(_differ(other, usual) for other, _ in self._found)
        too_long = stated > usual and is_constant and durations[usual] >= _FEW
        too_short = stated < usual and end is not None and start + stated < end - _ROUNDING
        wrong += _differ(stated, usual) and (too_long or too_short)
        if not wrong:
            return None
        return f"the audio is damaged: {wrong} of its Opus packets have a header that contradicts the time stamps"


def _differ(stated: float, usual: float) -> bool:
    """Return whether two durations in seconds differ by more than imprecise time stamps can explain."""
    return abs(stated - usual) > max(0.1 * usual, _ROUNDING)
