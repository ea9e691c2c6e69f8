from mopd_nemo.engines.base import seed_of


def test_a_seed_is_a_function_of_its_name_that_torch_and_vllm_take() -> None:
    names = [f"train/0/{step}/{prompt}" for step in range(50) for prompt in range(8)]
    seeds = [seed_of(name) for name in names]
    assert seeds == [seed_of(name) for name in names] and len(set(seeds)) == len(names)
    assert all(0 <= seed < 2**56 for seed in seeds)
    assert seed_of("train/0/1/0") == 64311555946577052, "runs of other versions draw the same"
