"""Random damage to files, for the fuzzers."""

import random


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Damages bytes: some are flipped, set, zeroed, repeated or cut off."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        at = rng.randrange(len(changed))
        match rng.randrange(5):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                width = min(rng.choice((4, 8, 64)), len(changed) - at)
                changed[at : at + width] = bytes([rng.choice((0, 0xFF))]) * width
            case 3:
                changed[at:at] = changed[at : at + rng.randrange(1, 64)]
            case 4 if rng.random() < 0.2:
                del changed[at:]
                changed = changed or bytearray(b"\0")
    return bytes(changed)
