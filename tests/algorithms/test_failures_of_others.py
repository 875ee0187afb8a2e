"""How the loops of other toolkits, and of the origin, went wrong: each test fails if this package had the defect."""

import gc
import json
import re
import shutil
from collections import Counter
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from helpers.runs import ROOT, interrupted, of_round, torchrun
from helpers.runs import TINY as SMALL
from helpers.tiny import llama_tokenizer, save_llama
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from bcft import filtered
from bcft.algorithms import filtered_bc
from bcft.config.loader import load
from bcft.config.schema import TrainingSettings
from bcft.environments.single_turn import SingleTurn
from bcft.errors import UsageError
from bcft.evaluation.held_out import held_out_loss
from bcft.generation import hf
from bcft.generation.mode import sampling_mode
from bcft.policy.chat_template import Renderer
from bcft.policy.loading import Policy, Precision
from bcft.rewards.math_answers import math_reward
from bcft.rollout import sample
from bcft.rollout.episode import Attempt, play
from bcft.runs.storage import read_json, read_jsonl
from bcft.selection.filter import Rule, select
from bcft.selection.scoring import score
from bcft.training import trainer as training
from bcft.training.trainer import BCTrainer, to_dataset, training_arguments
from bcft.types import IGNORED, Action, Problem, RolloutSettings, Sampling, TrainingExample, Trajectory, Turn

KEYS = SMALL | {"prompts_per_round": 18, "num_train_epochs": 2, "temperature": 0.9, "top_p": 0.95}
CUT = KEYS | {"num_rounds": 3, "warmup_rounds": 1, "prompts_per_round": 6, "learning_rate": 2e-3}
OTHER = {"temperature": 0.5, "dataset_train_split": "train[:100]", "seed": 1}
NOWHERE = {
    "a model's name": r"""["'][\w.-]*(llama|qwen|mistral|gemma|gpt[\w.-]|phi-?\d)[\w.-]*["']""",
    "arguments by position": r"\b(Accelerator|PartialState)\((?!\)|\w+=)",
    "somebody's home or token": r"/(home|Users|root)/|\b(hf_|sk-)\w{20,}",
}
MARK = "I hope it is correct."


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Return the directory of a run, each request with the modes of the model it was made to, each training step."""
    path, asked, steps = tmp_path_factory.mktemp("watched"), [], []
    generate, step, others = hf.HFEngine.generate, BCTrainer.training_step, models()

    def generating(self, requests):
        asked.extend((request, {module.training for module in self.model.modules()}) for request in requests)
        return generate(self, requests)

    def training_step(self, model, inputs, *rest):
        ids, mask = inputs["input_ids"], inputs["attention_mask"] == 1
        seen = {"ids": [tuple(row[real].tolist()) for row, real in zip(ids, mask, strict=True)]}
        if self.state.global_step == 0:
            seen |= {"models": len(models() - others), "weights": {n: p.clone() for n, p in model.state_dict().items()}}
        loss = step(self, model, inputs, *rest)
        steps.append(seen | {"modes": {module.training for module in model.modules()}, "loss": float(loss)})
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf.HFEngine, "generate", generating)
        patch.setattr(BCTrainer, "training_step", training_step)
        filtered.run(None, output_dir=str(path), **KEYS)
    return path, asked, steps


def models():
    gc.collect()
    return {id(found) for found in gc.get_objects() if type(found) is LlamaForCausalLM}


def test_the_policy_trains_in_training_mode_and_is_asked_in_eval_mode(watched):
    """Dropout was on while sampling with an adapter, and off while training without."""
    assert {request.key[1] for request, _ in watched[1]} == {"rollout", "dev", "test"}
    assert all(found == {False} for _, found in watched[1])
    assert all(step["modes"] == {True} for step in watched[2])


def test_the_recipes_sampling_reaches_the_engine_and_explores(watched):
    """One took the argmax, one had top_p 1.0 although the flag said 0.9, one always temperature 0.85."""
    for request, _ in watched[1]:
        greedy = request.key[1] != "rollout" and request.key[4] == -1
        assert request.sampling == (Sampling(temperature=0.0) if greedy else Sampling(temperature=0.9, top_p=0.95))
        assert request.max_new_tokens == 72
    rows = of_round(watched[0], 1, "rollouts.jsonl")
    assert len({(row["problem_id"], row["turns"][0]["action"]) for row in rows}) > 1.5 * 18


def test_what_is_published_was_measured_on_problems_that_were_never_attempted_for_training(watched):
    """The origin evaluated on training problems, one took the best of many averages over them."""
    path, ids = watched[0], {"rollout": set(), "dev": set(), "test": set()}
    for request, _ in watched[1]:
        ids[request.key[1]].add(request.key[3])
    assert [len(ids[split]) for split in ("dev", "test")] == [8, 2 * 8]  # test with the harder ones
    assert sum(map(len, ids.values())) == len(set().union(*ids.values()))
    metrics = read_json(path / "metrics.json")
    for name, number in (("base", 0), ("best", metrics["best_round"])):
        assert metrics[name] == of_round(path, number, "test/evaluation.json")


def test_an_epoch_takes_every_kept_row_once_and_its_loss_is_recorded(watched):
    """The origin drew with replacement, saw a fifth of what it kept, and never logged a loss."""
    path, _, steps = watched
    for number in (1, 2):
        train = of_round(path, number, "metrics.json")["train"]
        own, steps = steps[: train["steps"]], steps[train["steps"] :]
        kept = [tuple(row["input_ids"]) for row in of_round(path, number, "kept.jsonl")]
        assert Counter(ids for step in own for ids in step["ids"]) == Counter(2 * kept)
        assert train["loss"] == pytest.approx(sum(step["loss"] for step in own) / len(own), abs=1e-4)
    assert not steps


def test_one_model_is_in_memory_and_no_key_of_a_critic_or_a_buffer_is_accepted(watched):
    """The origin loads two critics and two more policies, and keeps a replay buffer, to clone behavior."""
    assert [step["models"] for step in watched[2] if "models" in step] == [1, 1]
    for key in ("critic_lr", "gamma", "tau", "capacity"):
        with pytest.raises(UsageError, match=f"{key}: unknown key"):
            load("filtered", None, KEYS | {key: 1})


def test_without_an_adapter_every_weight_is_trained_in_every_round(watched):
    """The origin froze all weights but an adapter's, also where there was none, so that nothing trained."""
    base, one = (step["weights"] for step in watched[2] if "weights" in step)
    two = load_file(watched[0] / "round_002" / "model" / "model.safetensors")
    assert len(two) > 10
    assert not [name for name in two if torch.equal(base[name], one[name]) or torch.equal(one[name], two[name])]


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """Return a run that was interrupted after its second round; the first only warmed up."""
    path = tmp_path_factory.mktemp("cut")
    with pytest.MonkeyPatch.context() as patch:
        interrupted(patch, path, filtered_bc, "commit", times=2, **CUT)
    return path


@pytest.fixture(scope="module")
def resumed(cut, tmp_path_factory):
    """Return the directory it resumed in, the attempts that were then played, and how often something was trained."""
    path, played, trained = shutil.copytree(cut, tmp_path_factory.mktemp("resumed") / "run"), [], []
    play, fit = sample.play_attempts, training.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sample,
            "play_attempts",
            lambda policy, new, *rest, **keys: played.extend(new) or play(policy, new, *rest, **keys),
        )
        patch.setattr(training, "fit", lambda *rest, **keys: trained.append(rest) or fit(*rest, **keys))
        filtered.run(None, output_dir=str(path), **CUT)
    return path, played, len(trained)


def test_a_resumed_run_plays_and_trains_only_what_is_left(resumed):
    """The origin began at iteration 0 again and warmed up a second time."""
    path, played, trained = resumed
    assert ([attempt.round for attempt in played if attempt.round], trained) == ([3] * 6 * 3, 1)
    assert [of_round(path, n, "metrics.json")["train"]["steps"] > 0 for n in (1, 2, 3)] == [False, True, True]


@pytest.mark.slow
def test_every_process_of_a_resumed_run_plays_with_the_weights_of_the_round_before(cut, resumed, tmp_path):
    """The origin loaded what it resumed from on its first process only."""
    shutil.copytree(cut, tmp_path / "run")
    # The run was started by one process.
    torchrun(
        "-m",
        "helpers.ranks",
        str(tmp_path),
        json.dumps(CUT),
        "--allow-drift",
        directory=tmp_path,
    )
    assert of_round(tmp_path / "run", 3, "rollouts.jsonl") == of_round(resumed[0], 3, "rollouts.jsonl")
    assert read_json(tmp_path / "rank_0.json") == read_json(tmp_path / "rank_1.json")


@pytest.mark.parametrize("key", OTHER)
def test_rollouts_of_other_settings_or_problems_are_never_taken_for_these(cut, key):
    """One resumed by counting lines, whatever temperature or prompts they had been made with."""
    with pytest.raises(UsageError, match=f"was started with another recipe .*{key} was"):
        filtered.run(None, output_dir=str(cut), **CUT | {key: OTHER[key]})


def tiny(path, tokenizer):
    return LlamaForCausalLM.from_pretrained(save_llama(path / "tiny", tokenizer, positions=64))


def trainer(network, path, rows, tokenizer, autocast="no"):
    arguments = training_arguments(TrainingSettings(), output_dir=path, autocast=autocast, use_cpu=True)
    return BCTrainer(network, arguments, examples=rows, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def renderer():
    return Renderer(llama_tokenizer([""], vocabulary=262, chat=False))


@pytest.mark.parametrize("autocast", ["no", "bf16"])
@pytest.mark.parametrize("gap", [-120.0, 12.0])
def test_the_loss_is_exact_for_impossible_and_for_nearly_certain_tokens(tmp_path, renderer, gap, autocast):
    """Log(softmax) is -inf from a gap of 104 on, its gradient NaN, and off by 58 % for a certain token in bf16."""
    network = tiny(tmp_path, renderer.tokenizer)
    with torch.no_grad():  # token 9, again and again, gets a logit of `gap` and every other one 0
        state = network.model(torch.tensor([[9]])).last_hidden_state[0, 0]
        network.lm_head.weight.zero_()[9] = state * gap / state.square().sum()
    rows = [TrainingExample(f"{n}", "p", (9,) * n, (IGNORED, *[9] * (n - 1))) for n in (3, 7)]
    policy = Policy(network, renderer, Precision("cpu", autocast, torch.float32, "test"))
    made = trainer(network, tmp_path, rows, renderer.tokenizer, autocast)
    with made.accelerator.autocast():
        logits = network(torch.tensor([rows[1].input_ids])).logits[0, :-1].detach().double()
        loss = made.compute_loss(network, made.data_collator(list(to_dataset(rows))))
    loss.backward()
    expected = -float(logits.log_softmax(-1)[:, 9].mean())
    assert expected == pytest.approx(125.6 if gap < 0 else 0.0016, rel=0.05)
    assert loss.item() == pytest.approx(expected, rel=0.02)
    assert held_out_loss(policy, rows) == pytest.approx(expected, rel=0.02)
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_a_stop_token_that_is_also_the_pad_token_keeps_its_label_and_rows_are_padded_to_the_longest(tmp_path):
    """With pad = EOS the collator masked every EOS, prompts were trained, and all rows were padded to 2048."""
    tokenizer = llama_tokenizer(["a b c"])
    tokenizer.pad_token, eos = tokenizer.eos_token, tokenizer.eos_token_id
    rows = [TrainingExample(f"{n}", "p", (7, 8, *[9] * n, eos), (IGNORED, IGNORED, *[9] * n, eos)) for n in (1, 4)]
    (batch,) = trainer(tiny(tmp_path, tokenizer), tmp_path, rows, tokenizer).get_train_dataloader()
    assert sorted(batch["labels"].tolist()) == sorted([[*rows[0].labels, *[IGNORED] * 3], [*rows[1].labels]])
    assert sorted(batch["attention_mask"].tolist()) == [[1] * 4 + [0] * 3, [1] * 7]


def played(problems, renderer, engine):
    attempts = [Attempt(problem, 1, 0) for problem in problems]
    settings = RolloutSettings(SingleTurn, Sampling(), max_new_tokens=8, max_turns=1, step_timeout=60.0, seed=0)
    trajectories = play(attempts, settings, renderer, engine, phase="rollout")
    return {trajectory.problem_id: trajectory for trajectory in trajectories}


@pytest.mark.parametrize("said", [f"It is 7. {MARK}", f"Say 7. {MARK}", MARK, f"Say 7. {MARK}\n{MARK} 8"])
def test_an_action_is_what_was_sampled_whatever_of_the_prompt_it_repeats(renderer, said):
    """One split the decoded whole at a phrase of its own prompt, one removed the prompt's text from it."""
    problem, ids, judged = Problem("p", f"Say 7. {MARK}"), tuple(renderer.completions([said])[0]), []
    engine = SimpleNamespace(generate=lambda requests: [Action(request.key, ids, "stop_token") for request in requests])
    trajectory = played([problem], renderer, engine)["p"]
    noting = [lambda completions, **_: judged.extend(completions) or [1.0]]
    score([trajectory], {"p": problem}, noting, weights=[1.0], success=None)
    assert [trajectory.turns[0].action, *judged] == [said] * 2
    assert trajectory.turns[0].action_ids == ids


def test_a_prompt_that_is_too_long_moves_nobody_elses_completion(renderer, tmp_path):
    """One dropped long prompts and then zipped, so that every later completion had another's prompt."""
    network = tiny(tmp_path, renderer.tokenizer)
    problems = [Problem(f"{n}", "x" * n) for n in (1, 2, 100, 3, 4)]
    with sampling_mode(network):
        engine = hf.HFEngine(network, pad_id=0)
        whole, alone = (played(given, renderer, engine) for given in (problems, problems[:2] + problems[3:]))
    assert whole.pop("100").turns[0].stop == "context_full"
    assert whole == alone


@pytest.mark.parametrize("prompt", ["Show that 3 + 4 is 7", "He has 7 apples. How many?", "7", r"Write \boxed{7}."])
@pytest.mark.parametrize("reply", ["", "I do not know.", "He eats 7 and has 8 left."])
def test_a_reference_that_stands_in_the_prompt_earns_nothing(prompt, reply):
    """The origin's reward was true before anything was generated, if the problem held the number."""
    for asked in (prompt, [{"role": "user", "content": prompt}]):
        assert math_reward([asked], [reply], answer=["7"], question=[prompt]) == [0.0]


def test_every_reward_function_grades_every_trajectory_and_a_whole_number_rounds_no_other():
    """One lost a completion with every reward model, one took a buffer's type from its first reward."""
    rewards, problems = [1, 0.7, 0, 0.25, 0.5], {str(n): Problem(str(n), "?") for n in range(5)}
    found = [Trajectory(1, p, 0, (Turn("7", (1,), (2,), "stop_token"),), "done") for p in problems]
    functions = [lambda **_: rewards, lambda **_: [0] * 5, lambda **_: rewards]
    scores = score(found, problems, functions, weights=[1, 1, 2], success=None)
    assert [[value for _, value in one.rewards] for one in scores] == [[r, 0, r] for r in rewards]
    assert [one.to_json("kept", 0.0)["reward"] for one in scores] == pytest.approx([3 * r for r in rewards])
    assert select([one.candidate for one in scores], Rule(keep_quantile=0.75)).kept == ("1-0-0", "1-1-0")


def test_what_errored_is_neither_graded_nor_a_failure():
    """A rollout that failed became data with reward 0."""
    errored, problems = Trajectory(1, "p", 0, (), "error", "x"), {"p": Problem("p", "3 + 4?", {"answer": "7"})}
    (found,) = score([errored], problems, [math_reward], weights=[1.0], success=math_reward)
    assert (found.graded, found.success) == (False, "unknown")


def test_an_empty_action_is_never_trained_on(tmp_path):
    """Nothing kept the origin from cloning empty actions."""

    def short(completions, **_):
        return [-float(len(text.strip())) for text in completions]

    keys = KEYS | {"model_name_or_path": "bcft:tiny-init", "num_generations": 30, "max_completion_length": 8}
    filtered.run(None, output_dir=str(tmp_path), reward_funcs=[short], success_func="", **keys | {"num_rounds": 1})
    place = tmp_path / "round_001"
    said = {line["id"]: line["turns"][0]["action"].strip() for line in read_jsonl(place / "rollouts.jsonl")}
    liked = [row["id"] for row in read_jsonl(place / "scores.jsonl") if row["decision"] == "kept"]
    assert any(not said[one] for one in liked)  # or this test would show nothing
    kept = read_jsonl(place / "kept.jsonl")
    assert {row["id"] for row in kept} == {one for one in liked if said[one]}
    metrics = read_json(place / "metrics.json")
    assert metrics["train"]["rows"] == len(kept)
    assert "not used for training" in metrics["selection"]["note"]


def test_the_time_limit_of_processes_reaches_them(tmp_path):
    """The handler with the limit was given to Accelerator by position, where it is another argument."""
    settings = TrainingSettings(passed_through={"ddp_timeout": 77})
    arguments = training_arguments(settings, output_dir=tmp_path, autocast="no", use_cpu=True)
    assert arguments.ddp_timeout_delta == timedelta(seconds=77)


@pytest.mark.parametrize("what", NOWHERE)
def test_no_file_holds(what):
    """`meta-llama` got four times the gradient of other names, recipes held `/home/...` and tokens."""
    # The tiny tokenizer of `testing` has a known template, and `shape` refuses a model by its name.
    package = {*(ROOT / "bcft").rglob("*.py")} - {ROOT / "bcft" / "testing.py", ROOT / "bcft" / "policy" / "shape.py"}
    for file in [*package, *(ROOT / "recipes").rglob("*.yaml")]:
        text = re.sub(r"#.*|^model_name_or_path.*", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert not re.search(NOWHERE[what], text, re.IGNORECASE), file
