def test_host_counts_by_hand(toy):
    spec = toy.population([1]).spec
    # 5 -> 4 -> 4 -> 4 -> 3
    assert spec.layers == [(5, 4), (4, 4), (4, 4), (4, 3)]
    assert spec.flops == 20 + 16 + 16 + 12
    assert spec.parameter_count == 64 + 4 + 4 + 4 + 3
