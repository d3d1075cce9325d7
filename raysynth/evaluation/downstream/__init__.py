"""The usefulness trial: do networks learn more from real and synthetic slices than from real ones?

Every arm is trained for the same number of steps and judged on real patients alone, whom neither
the network nor the generator has seen (methods, C and F.9 to F.10).
"""
