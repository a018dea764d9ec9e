"""The Container Storage Interface: `netstore-csi`, a process beside netstored whose client it is.

It keeps no state: what is staged and published where, netstored knows as the holders of a volume.
"""
