"""Speech tokens at 21.5 frames a second: NVIDIA's Low Frame-rate Speech Codec, fast and offline."""
