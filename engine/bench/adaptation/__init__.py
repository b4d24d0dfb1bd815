"""`slipstream bench adaptation`: what learning from live traffic is worth, what it costs, what the gate prevents.

Five arms serve the same requests, one after the other: none, ngram, static (trained offline, frozen), adaptive without
a gate, adaptive with one. Responses are made once; every arm drafts over them again, exactly, under the engine's own K
control and a profile of its target passes measured in this run. A subsample is then decoded for real, interleaved, to
hold the computed ratios against.
"""

from engine.bench.adaptation.run import Options, run

__all__ = ["Options", "run"]
