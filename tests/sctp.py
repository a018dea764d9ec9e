"""SCTP without its sockets, which need a module of the kernel; translation of its ports does not."""

INIT = """
import socket, struct, sys
init = struct.pack("!BBHIIHHI", 1, 0, 20, 7, 65536, 1, 1, 7)
packet = struct.pack("!HHII", 4444, int(sys.argv[2]), 0, 0) + init
table = [0] * 256
for n in range(256):
    c = n
    for _ in range(8):
        c = c >> 1 ^ (0x82F63B78 if c & 1 else 0)
    table[n] = c
crc = 0xFFFFFFFF
for byte in packet:
    crc = crc >> 8 ^ table[(crc ^ byte) & 255]
packet = packet[:8] + struct.pack("<I", crc ^ 0xFFFFFFFF) + packet[12:]
socket.socket(socket.AF_INET, socket.SOCK_RAW, 132).sendto(packet, (sys.argv[1], 0))
"""
"""A program: sends an INIT chunk (RFC 9260, section 3.3.2) from port 4444 to an address and a port."""
