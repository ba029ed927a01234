"""Compare this server with llama.cpp and OpenVINO: `make bench-cpu-peers`, or `python -m bench.peers --help`.

Each pass iterates over the rows, and each row over the servers, so that noise of the machine affects all of them alike.
A server runs only while it is measured. This server and llama.cpp are measured over HTTP, OpenVINO in its own process.
"""
