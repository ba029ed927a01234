"""This server beside llama.cpp and OpenVINO in one run: `make bench-cpu-peers`, or `python -m bench.peers --help`.

Each pass goes through the rows, and each row through the servers, so that all of them meet the same neighbours. A
server runs only while it is measured. This server and llama.cpp are measured through HTTP, OpenVINO in its own process.
"""
