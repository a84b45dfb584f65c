#!/usr/bin/env python3
"""A one-dimensional energy balance climate model: the demonstration image's payload.

The temperature T(x), x the sine of the latitude, obeys

    C dT/dt = S0/4 s(x) (1 - albedo(T)) - (A + B T) + F + d/dx [ D (1 - x^2) dT/dx ]

sunlight absorbed, infrared emitted, forcing, heat carried poleward; ice, which is bright, lies where T < -10 degrees C.
The model is that of G. R. North, R. F. Cahalan, J. A. Coakley, "Energy balance climate models", Reviews of Geophysics 19 (1981);
the constants are textbook values, A chosen to give the present mean temperature.
"""

from __future__ import annotations

import platform
import sys
import time

import numpy as np

S0 = 1365.2  # W m^-2, sunlight at the top of the atmosphere
A, B = 206.0, 2.0  # W m^-2 and W m^-2 K^-1, infrared emission
D = 0.555  # W m^-2 K^-1, transport of heat
C = 2.1e8 / 86400  # W day m^-2 K^-1, heat capacity of 50 m of sea water
DAY = 5.0  # days in one time step
CO2 = 3.7  # W m^-2, forcing of twice the carbon dioxide
BANDS = 180  # of equal area, pole to pole

# name, brightness of the sun, forcing in W m^-2, temperature at the start in degrees C
CASES = [
    ("today", 1.0, 0.0, 15.0),
    ("twice the CO2", 1.0, CO2, 15.0),
    ("sun 1 % weaker", 0.99, 0.0, 15.0),
    ("begun as a snowball", 1.0, 0.0, -60.0),
]


def grid() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Band centres x, sunlight s(x) with mean 1, and the matrix of d/dx [D (1 - x^2) d/dx]."""
    edge = np.linspace(-1, 1, BANDS + 1)
    x = (edge[1:] + edge[:-1]) / 2
    flux = D * (1 - edge**2) / (edge[1] - edge[0]) ** 2  # vanishes at both poles
    transport = np.diag(flux[1:-1], 1) + np.diag(flux[1:-1], -1) - np.diag(flux[1:] + flux[:-1])
    sun = 1 - 0.48 * (3 * x**2 - 1) / 2
    return x, sun / sun.mean(), transport


def absorbed(x: np.ndarray, sun: np.ndarray, temperature: np.ndarray, brightness: float) -> np.ndarray:
    """W m^-2 of sunlight taken up in each band."""
    coalbedo = np.where(temperature < -10, 0.38, 0.67 - 0.25 * (3 * x**2 - 1) / 2)
    return S0 * brightness / 4 * sun * coalbedo


def equilibrium(brightness: float = 1, forcing: float = 0, start: float = 15) -> tuple[np.ndarray, float, int]:
    """Steps on from a planet of one temperature until nothing moves: T in degrees C, the imbalance left in W m^-2, years."""
    x, sun, transport = grid()
    step = np.linalg.inv(np.eye(BANDS) * (C / DAY + B) - transport)  # implicit in emission and transport
    temperature = np.full(BANDS, float(start))
    steps, moved = 0, np.inf
    while moved > 1e-9 and steps < 400_000:
        gain = absorbed(x, sun, temperature, brightness) - A + forcing
        following = step @ (C / DAY * temperature + gain)
        moved = np.abs(following - temperature).max()
        temperature = following
        steps += 1
    imbalance = (absorbed(x, sun, temperature, brightness) - A + forcing - B * temperature).mean()
    return temperature, float(imbalance), round(steps * DAY / 365)


def main() -> int:
    begun = time.perf_counter()
    system = platform.freedesktop_os_release()["PRETTY_NAME"]
    print(f"Python {platform.python_version()} and NumPy {np.__version__} of {system}")
    print(f"{'':24}{'mean':>9}{'equator':>9}{'pole':>9}{'ice edge':>10}{'imbalance':>12}{'years':>7}")
    latitude = np.degrees(np.arcsin(grid()[0]))
    means, worst = {}, 0.0
    for name, brightness, forcing, start in CASES:
        t, imbalance, years = equilibrium(brightness, forcing, start)
        frozen = np.abs(latitude[t < -10])
        edge = "none" if not len(frozen) else "equator" if len(frozen) == BANDS else f"{frozen.min():.1f} N/S"
        print(f"{name:24}{t.mean():9.2f}{t[BANDS // 2]:9.2f}{t[-1]:9.2f}{edge:>10}{imbalance:12.1e}{years:7d}")
        means[name] = t.mean()
        worst = max(worst, abs(imbalance))
    warming = means["twice the CO2"] - means["today"]
    print(f"climate sensitivity: {warming:.2f} K for twice the CO2; if the ice did not melt, {CO2 / B:.2f} K")
    print(f"energy is conserved to {worst:.0e} W m^-2; {time.perf_counter() - begun:.1f} s")
    return 0 if worst < 1e-6 else 1


if __name__ == "__main__":
    sys.exit(main())
