"""nnsight around a model of ours: what it reads and changes by hooks is what our own points are."""

import torch
from nnsight import NNsight

from llama import Scale
from tests.model.models import tiny_model


def test_what_it_reads_and_changes_is_what_points_are():
    model, ids = tiny_model(), torch.tensor([[5, 6, 7, 8]])
    _, cache = model.run_with_cache(ids, "layers.0.mlp_out")
    expected = model.logits(ids, interventions=[Scale("layers.1.mlp_out", 0.0)])
    wrapped = NNsight(model)
    with wrapped.trace(ids, fn=model.logits) as tracer:
        read = wrapped.layers[0].mlp.output.clone().save()
        wrapped.layers[1].mlp.output[:] = 0
        found = tracer.result.save()
    torch.testing.assert_close(read, cache["layers.0.mlp_out"][0], rtol=0, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert not torch.equal(model.logits(ids), expected)
