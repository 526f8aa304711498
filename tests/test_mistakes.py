"""What a mistake says: one line that names the culprit, no traceback, and nothing left behind.

Every row is a command line, run in this process: `launcher arguments`, and a word that the line has to hold. $RUN is a
run of PPO, $SCRATCH a folder of damaged files, $NEW a folder that must not come to be.
"""
import importlib
import json
import pathlib
import re
import shlex
import shutil
import socket
import sys

import jax
import numpy as np
import pytest
from absl import flags

from algorithms import icem_online, ppo
from core.config import Checked, check, leaves
from core.errors import UserError
from launchers import cli, processes
from launchers.train import train

ROOT = pathlib.Path(__file__).parents[1]
FILES = dict(
    PPO="algorithms/ppo.py", PETS="algorithms/pets.py", EKF="algorithms/ekf_lqr.py", SAC="algorithms/sac.py",
    CROSSQ="algorithms/crossq.py", PQN="algorithms/pqn.py", MUZERO="algorithms/muzero.py",
    CHANCE="algorithms/stochastic_muzero.py", ZERO="algorithms/alphazero.py",
    LOLA="algorithms/lola.py", DICE="algorithms/lola_dice.py", SHEPHERD="algorithms/good_shepherd.py",
    SHAPER="algorithms/shaper.py", ALIGN="algorithms/advantage_alignment.py", MEMORY="algorithms/ppo_memory.py",
    IQL="algorithms/iql.py", BC="algorithms/bc.py", REBRAC="algorithms/rebrac.py", FQL="algorithms/fql.py",
    CQL="algorithms/cql.py", DISCRETE="algorithms/cql_discrete.py",
    POLE="configs/icem_online_longer_pole.py", TRACKING="algorithms/ippo.py", OFFLINE="algorithms/dynamics.py")

NUMBERS = dict(  # of every config, and what it may not be
    PPO=dict(lr=(0, -1, "nan", "inf"), discount=(-0.1, 2, "nan"), gae_lambda=(-1, 1.5), clip=(0, -1), num_envs=(0, -4),
              num_steps=(0, -1), env_steps=(0, -5, 10), eval_every=(0, -1), eval_episodes=(0, -3), num_epochs=(0,),
              num_minibatches=(0, 7), max_grad_norm=(0, -1), value_coef=(-1,), entropy_coef=(-0.1, "inf"),
              init_std=(0, -1), adam_eps=(0, -1e-5), hidden_dims=("(64,-3)", "(0,)", "(2.5,)", "(True,)")),
    TRACKING=dict(lr=(0,), discount=(1.1,), num_minibatches=(5,), init_std=(0,), num_epochs=(-1,)),
    PETS=dict(horizon=(0, -1), num_particles=(4, 0), num_members=(0,), random_steps=(-1,), batch_size=(0,),
               weight_decay=(-1,), kept_elites=(-1, 41), far=(0,), num_updates=(0,), min_std=(0,), search=("mppi",),
               propagation=("ts2",), log_every=(0,), **{
                   "planner.num_elites": (0, 100), "planner.num_samples": (0, 9), "planner.num_iterations": (0,),
                   "planner.init_std": (0,), "planner.momentum": (-0.1, 1.1), "planner.decay": (0,),
                   "planner.noise_beta": (-1,)}),
    EKF=dict(horizon=(0,), info_weight=(-1, "nan"), prior_var=(0, -1), obs_var=(0,), num_linearizations=(0,),
              drift_var=(-1,), drift_decay=(2,), drift_floor=(-1,), explore=("joynt",), actions=("none",),
              about=("weather",), **{"env_kwargs.process_noise": (-1, "nan", "much"), "env_kwargs.max_steps": (0, 2.5),
                                     "env_kwargs.spread": (0.5,), "env_kwargs.jump_step": (-1, 10**6),
                                     "env_kwargs.reveal": (3,), "env_kwargs.jump_by": ("(('mass',1.0),)", 5)}),
    POLE=dict(belief=("half",), adapt=("none",), lora_rank=(0,), forgetting=(0, -1), noise_rate=(-1, 2), hidden_dims=(
        "(-1,)",), prior_var=("nan",)),
    SAC=dict(batch_size=(0,), buffer_size=(0,), updates_per_step=(0,), tau=(-0.1, 1.1), lr=(0,), discount=(1.01,),
              init_temperature=(0, -1), log_std_bounds=("(2,-10)",), random_steps=(-1,), hidden_dims=("(0,)",),
              target_entropy=("nan", "high")),
    IQL=dict(updates=(0, -5), updates_per_step=(0, -1), eval_every=(0,), eval_episodes=(0,), batch_size=(0,), lr=(0,),
              discount=(1.01,), tau=(-0.1, 1.1), expectile=(-0.1, 1.1, "nan"), inverse_temperature=(0, -3),
              max_weight=(0, "inf"), return_range=(0, -1), log_std_bounds=("(2,-5)",), hidden_dims=("(0,)",)),
    BC=dict(updates=(0,), updates_per_step=(0,), batch_size=(-1,), lr=(0, "nan"), log_std_bounds=("(1,)",)),
    REBRAC=dict(batch_size=(0,), lr=(0,), discount=(1.01,), tau=(-0.1,), actor_penalty=(-1, "nan"),
                 critic_penalty=(-1,), smoothing_std=(-0.1,), smoothing_clip=(-0.5,), policy_delay=(0,)),
    FQL=dict(batch_size=(0,), lr=(-1,), discount=(1.01,), tau=(1.1,), flow_steps=(0, -1, 2.5), distill_weight=(-1,)),
    CQL=dict(batch_size=(0,), lr=(0,), actor_lr=(0, -1), discount=(1.01,), tau=(1.1,), cql_alpha=(-1, "nan"),
             num_actions=(0, 2.5), init_temperature=(0,), target_entropy=("nan",), log_std_bounds=("(2,-5)",)),
    DISCRETE=dict(batch_size=(0,), lr=(0,), discount=(1.01,), tau=(-0.1,), cql_alpha=(-0.1,)),
    CROSSQ=dict(policy_delay=(0,), adam_b1=(1.2,), norm_momentum=(-0.1,), renorm_after=(-1,), r_max=(0,), d_max=(0,),
                 critic_dims=("(2.5,)",)),
    PQN=dict(init_epsilon=(1.1,), final_epsilon=(-0.1,), epsilon_steps=(-1,), trace=(1.5,), channels=(-1,),
              reward_scale=(0,), num_minibatches=(7,)),
    MUZERO=dict(num_simulations=(0,), max_considered=(0,), num_updates=(0,), search=("alpha",), num_bins=(0,),
                 value_bound=(0, -1), unroll=(0,), n_step=(0,), priority_exponent=(-0.1, 2), reanalyse=(-1, 1.1),
                 epsilon=(-0.1, 1.1), weight_decay=(0,), latent_dim=(0,), channels=(-1,), random_steps=(0, 64),
                 buffer_size=(0, 32), discount=(1.5,)),
    CHANCE=dict(num_codes=(0,), commitment=(0, -1), num_simulations=(0,), **{"env_kwargs.side": (1, 5, 2.5)}),
    ZERO=dict(num_simulations=(0,), max_considered=(0,), epsilon=(-0.1, 1.1), random_steps=(64,), buffer_size=(64,),
               hidden_dims=("(0,)",), **{"env_kwargs.opponent": ("me",)}),
    LOLA=dict(form=("exact",), lr=(0, -1, "nan"), opponent_lr=(0, -1, "inf"), init_std=(0,), updates=(0, -1),
               eval_every=(0,), **{"env_kwargs.discount": (0, 1, -0.1, "nan"), "env_kwargs.payoff": (
                   "((-1,-1),(-3,0),(0,-3))", "((-1,-1),(-3,0),(0,-3),(-2,1e999))", "((-1,-1),(-3,0),(0,-3),(-2,'D'))",
                   "(-1,-3,0,-2)", "((-1,-1),(-3,0),(0,-3),(-2,None))", "nan", -1)}),
    DICE=dict(lookahead=(-1, 1.5), lr=(0,), opponent_lr=(0, "nan"), init_std=(0,), discount=(1.1,), updates=(0,)),
    ALIGN=dict(alignment=(-1, "nan"), discount=(1.5,), **{"env_kwargs.max_steps": (0,)}),
    MEMORY=dict(memory_dim=(0, -1), num_minibatches=(0, 3)),
    SHEPHERD=dict(population=(0, 7, -2), noise_std=(0, -1, "nan"), lr=(0, -1), updates=(0,), num_envs=(0,), **{
        "env_kwargs.discount": (1,), "env_kwargs.learning_rate": (0, -1, "inf"), "env_kwargs.init_std": (0,),
        "env_kwargs.max_steps": (0, 2.5)}),
    SHAPER=dict(population=(0, 7), noise_std=(0,), lr=(-1,), memory_dim=(0, 2.5), **{
        "env_kwargs.rounds": (0, -3, 1.5), "env_kwargs.games": (0,), "env_kwargs.learning_rate": (0, "nan"),
        "env_kwargs.payoff": ("((-1,-1),(-3,0),(0,-3))",)}),
)
CULPRITS = {"env_steps=10": "no iteration"}
TYPED = """
train $PPO --config.learning_rte=1                                          | learning_rte
train $PPO --config.num_env=8                                               | num_envs
train $PPO --config.num_envs=many                                           | num_envs
train $PPO --config.num_envs=2.5                                            | num_envs
train $PPO --config.anneal_lr=perhaps                                       | anneal_lr
train $PPO --config.env=gymnax/CartPol-v1                                   | gymnax/CartPole-v1
train $PPO --config.env=gymnas/CartPole-v1                                  | gymnas/CartPole-v1
train $PPO --config.env=from_gymnax                                         | "from_gymnax"
train $PPO --config.env=from_gymnasium                                      | "from_gymnasium"
train $PPO --config.env=hidden                                              | "hidden"
train $PPO --config.env=../ekf                                              | "../ekf"
train $PPO --config.env=                                                    | environment ""
train $PPO --config.env=pursuit_evasion                                     | several agents
train $PPO --config.algorithm=pppo                                          | "ppo"
train $PPO --config.algorithm=../core/ekf                                   | ../core/ekf
train $PPO --config.algorithm=pets                                          | "
train $PPO --config.env_kwargs.gravity=heavy                                | gravity
train $PPO --config.env_kwargs.gravty=9                                     | masspole
train $PPO --config.env_kwargs.length=0                                     | length
train $PPO --config.env_kwargs.max_steps_in_episode=-1                      | max_steps_in_episode
train $PPO --config.env_kwargs.tau=nan                                      | tau
train $PPO --config.env_kwargs=5                                            | env_kwargs
train $PPO --config.env=cartpole_swingup --config.env_kwargs.cart_mas=9     | cart_mass
train $PPO --config.env=cartpole_swingup --config.env_kwargs.cart_mass=-1   | cart_mass
train $PPO --config.env=cartpole_swingup --config.env_kwargs.dt=inf         | dt
train $PPO --config.env=cartpole_swingup --config.env_kwargs.substeps=1.5   | substeps
train $PPO --config.env=linear_tracking "--config.env_kwargs.goal=(1.0,)"   | goal
train $PPO --config.env=linear_tracking "--config.env_kwargs.a=((1.0,),)"   | a =
train $PPO --config.env=linear_tracking "--config.env_kwargs.jump_by=(1,2)" | jump_by
train $PPO --config.env=gymnasium/                                          | "gymnasium/"
train $PPO --config.env=gymnasium/os:path                                   | "gymnasium/os:path"
train $PPO --config.eval_env_kwargs.lenth=3                                 | lenth
train $PETS "--config.log_var_bounds=(1,-1)"                                | log_var_bounds
train $PETS "--config.log_var_bounds=(1,)"                                  | log_var_bounds
train $PETS --config.smoke.num_steps=0                                      | smoke.num_steps
train $TRACKING --config.env_kwargs.num_agents=0                            | num_agents
train $TRACKING --config.env_kwargs.agents=3                                | num_agents
train $TRACKING --config.env=gymnax/CartPole-v1                             | one agent
train $PETS --config.env=gymnax/CartPole-v1                                 | discrete actions
train $PETS --config.env=gymnax/Pendulum-v1                                 | no "cost"
train $PETS --config.env=pursuit_evasion                                    | several agents
train $EKF --config.env=multi_agent_tracking                                | "process_noise"
train $EKF --config.env=linear_tracking                                     | gain
train $EKF --config.env_kwargs.procces_noise=0.1                            | process_noise
train $EKF --config.planner.num_sampels=3                                   | num_sampels
train $EKF --config.planner=3                                               | planner
train $SAC --config.env=gymnax/CartPole-v1                                  | discrete actions
train $SAC --config.env=pursuit_evasion                                     | several agents
train $SAC --config.random_steps=20000                                      | no iteration
train $CROSSQ --config.env=gymnax/CartPole-v1                               | discrete actions
train $PQN --config.env=gymnax/Pendulum-v1                                  | continuous actions
train $PQN --config.env=gymnax/Breakout-MinAtar                             | channels
train $PQN --config.channels=4                                              | channels
train $MUZERO --config.env=gymnax/Pendulum-v1                               | continuous actions
train $MUZERO --config.env=pursuit_evasion                                  | several agents
train $MUZERO --config.env=gymnax/Breakout-MinAtar                          | channels
train $MUZERO --config.random_steps=200000                                  | no iteration
train $CHANCE --config.search=gumbel                                          | search
train $CHANCE --config.env_kwargs.sides=3                                     | sides
train $ZERO --config.env=pgx/tictactoe                                      | tic_tac_toe
train $PPO --config.env=pgx/tic_tac_toe                                     | opponent
train $MUZERO --config.env=pgx/tic_tac_toe                                  | opponent
train $LOLA --config.env=iterated_matrix_game                               | "values"
train $LOLA --config.env=gymnax/CartPole-v1                                 | "values"
train $LOLA --config.env_kwargs.payof=1                                     | payoff
train $SHEPHERD --config.env=infinite_matrix_game                           | several agents
train $SHEPHERD --config.env=fixed_coplayer                                 | discrete
train $DICE --config.env=fixed_coplayer                                     | one agent
train $SHAPER --config.env=learning_coplayer                                | continuous
train $SHAPER --config.env_kwargs.max_steps=10                              | rounds
train $SHEPHERD --config.env_kwargs.coplayer=naive                          | learning_rate
train $PPO --config.env=iterated_matrix_game                                | several agents
train $PPO --config.env=fixed_coplayer --config.env_kwargs.coplayer=me      | coplayer
train $PPO --config.env=fixed_coplayer "--config.env_kwargs.payoff=((0,),)" | payoff
train $TRACKING --config.env=iterated_matrix_game --config.env_kwargs.max_steps=0 | max_steps
train $ALIGN --config.env=fixed_coplayer                                    | one agent
train $TRACKING --config.env=coin_game "--config.env_kwargs.payoff=((1,1),(1,1))" | payoff
train $ZERO --config.env_kwargs.reveal=False                                | reveal
train $ZERO --config.eval_env_kwargs.oponent=random                         | oponent
train $POLE --config.env=gymnax/CartPole-v1                                 | "jump_by"
train $POLE --config.num_steps=2                                            | num_steps
train $POLE --config.pretrained=$SCRATCH/nothing.npz                        | nothing.npz
train $POLE --config.pretrained=$SCRATCH/text.npz                           | text.npz
train $POLE --config.pretrained=$SCRATCH/good.npz                           | good.npz
train $POLE --config.pretrained=$SCRATCH/pickle.npz                         | pickle.npz
train --config=configs/icem_online_longer_pole.py:nothing                   | nothing
train $OFFLINE                                                              | data.npz
train $OFFLINE --config.dataset=$SCRATCH/nothing.npz                        | nothing.npz
train $OFFLINE --config.dataset=$SCRATCH/text.npz                           | text.npz
train $OFFLINE --config.dataset=$SCRATCH/half.npz                           | half.npz
train $OFFLINE --config.dataset=$SCRATCH/strings.npz                        | strings.npz
train $OFFLINE --config.dataset=$SCRATCH/complex.npz                        | complex.npz
train $OFFLINE --config.dataset=$SCRATCH/nan.npz                            | nan.npz
train $OFFLINE --config.dataset=$SCRATCH/scalar.npz                         | scalar.npz
train $OFFLINE --config.dataset=$SCRATCH/terminated.npz                     | terminated
train $OFFLINE --config.dataset=$SCRATCH/no_end.npz                         | terminated
train $OFFLINE --config.dataset=$SCRATCH/no_reward.npz                      | reward
train $OFFLINE --config.dataset=$SCRATCH/lengths.npz                        | lengths.npz
train $OFFLINE --config.dataset=$SCRATCH/empty.npz                          | empty.npz
train $OFFLINE --config.dataset=$SCRATCH/wide.npz                           | wide.npz
train $OFFLINE --config.dataset=$SCRATCH/one_episode.npz                    | one episode
train $OFFLINE --config.dataset=$SCRATCH/pickle.npz                         | pickle.npz
train $OFFLINE --config.dataset=$SCRATCH/good.npz --config.rollout_steps=99 | rollout_steps = 99
train $OFFLINE --config.dataset=$SCRATCH/good.npz --config.holdout=1.5      | holdout
train $OFFLINE --config.dataset=$SCRATCH                                    | $SCRATCH
train $OFFLINE --config.dataset=minari:nothing/of-the-kind-v0               | inari
train $IQL --config.dataset=$SCRATCH/good.npz                               | obs (4,) where the environment has (3,)
train $IQL --config.env=gymnax/CartPole-v1 --config.dataset=$SCRATCH/poles.npz | discrete actions
train $REBRAC --config.env=gymnax/CartPole-v1 --config.dataset=$SCRATCH/poles.npz | discrete actions
train $FQL --config.env=gymnax/CartPole-v1 --config.dataset=$SCRATCH/poles.npz | discrete actions
train $CQL --config.env=gymnax/CartPole-v1 --config.dataset=$SCRATCH/poles.npz | discrete actions
collect --config=configs/cql_discrete_cartpole.py --config.collect.random_actions=1.5 | random_actions
train $BC --config.env=cartpole_swingup --config.dataset=$SCRATCH/five.npz  | action (2,)
train $BC --config.env=gymnax/CartPole-v1 --config.dataset=$SCRATCH/good.npz | action (1,)
train $BC --config.env=gymnax/CartPole-v1 --config.dataset=$SCRATCH/three.npz | one of the 2
train $BC --config.dataset=d4rl:$SCRATCH/nothing.hdf5                       | nothing.hdf5
collect --config=configs/iql_pendulum.py                                    | --run
collect --config=configs/iql_pendulum.py --run=$RUN                         | gymnax/CartPole-v1
collect --config=configs/iql_pendulum.py --config.collect.num_envs=0        | collect.num_envs
collect $IQL                                                                | collect
train                                                                       | --config
train --config=                                                             | config
train --config=configs/nothing.py                                           | configs/nothing.py
train --config=configs                                                      | configs
train --config=core/ekf.py                                                  | get_config
train --config=README.md                                                    | README.md
train --config=$SCRATCH/none.py                                             | none.py
train --config=$SCRATCH/dict.py                                             | dict.py
train --config=$SCRATCH/foreign.py                                          | "foreign"
train --config=$SCRATCH/lacks.py                                            | "lr"
train --config=$SCRATCH/section.py                                          | planner
train $PPO --config.lr                                                      | lr
train $PPO --resume                                                         | config.json
train $PPO --num_seedz=2                                                    | num_seedz
train $PPO num_seeds=2                                                      | num_seeds=2
train $PPO --num_seeds=0                                                    | --num_seeds=0
train $PPO --num_seeds=-2                                                   | --num_seeds=-2
train $PPO --num_seeds=two                                                  | num_seeds
train $PPO --seed=-1                                                        | --seed=-1
train $PPO --seed=99999999999                                               | --seed
train $PPO --eval_seed=-1                                                   | --eval_seed=-1
train $PPO --save_every=-1                                                  | --save_every
train $PPO --save_every=nan                                                 | --save_every
train $PPO --keep=0                                                         | --keep=0
train $PPO --chunk=-1                                                       | --chunk
train $PPO --devices=-1                                                     | --devices=-1
train $PPO --devices=64                                                     | --devices=64
train $PPO --devices=many                                                   | devices
train $PPO --wandb=perhaps                                                  | wandb
train $PPO --wandb=online                                                   | wandb login
train $PPO --coordinator=foo                                                | --coordinator=foo
train $PPO --coordinator=foo:bar                                            | --coordinator=foo:bar
train $PPO --coordinator=127.0.0.1:99999                                    | --coordinator
train $PPO --coordinator=127.0.0.1:1 --num_processes=2 --process_id=2       | --process_id=2
train $PPO --coordinator=no.such.host.invalid:1 --num_processes=0           | --num_processes=0
train $PPO --workdir=/dev/null/x                                            | /dev/null
train $PPO --workdir=$SCRATCH/text.npz                                      | text.npz
train $PPO --workdir=$RUN                                                   | already holds a run
train $PPO --workdir=$RUN --resume                                          | was
evaluate                                                                    | --run
evaluate --run=                                                             | run
evaluate --run=$SCRATCH                                                     | config.json
evaluate --run=$SCRATCH/nothing                                             | nothing
evaluate --run=$RUN --episodes=0                                            | --episodes=0
evaluate --run=$RUN --episodes=-1                                           | --episodes=-1
evaluate --run=$RUN --episodes=x                                            | episodes
evaluate --run=$RUN --eval_seed=-1                                          | --eval_seed
evaluate --run=$RUN/checkpoints/step_000000000999.npz                       | step_000000000999
evaluate --run=$RUN --smoke --gif=$NEW/x/y.gif                              | $NEW
evaluate --run=$RUN --smoke --gif=$NEW.doc                                  | .doc
evaluate --run=$RUN --smoke --picture=$NEW/x/y.png                          | $NEW
evaluate --run=$RUN --smoke --picture=$NEW.doc                              | .doc
evaluate --run=$RUN --smoke --cross_play                                    | opponents
evaluate --run=$SCRATCH/pets_run --smoke                                    | pets_run
evaluate --run=$SCRATCH/list_run --smoke                                    | config.json
evaluate --run=$SCRATCH/half_run --smoke                                    | config.json
evaluate --run=$SCRATCH/bytes_run --smoke                                   | config.json
evaluate --run=$SCRATCH/unnamed_run --smoke                                 | algorithm
evaluate --run=$SCRATCH/words_run --smoke                                   | num_seeds
evaluate --run=$SCRATCH/negative_run --smoke                                | num_envs
evaluate --run=$SCRATCH/other_run --smoke                                   | hidden_dims
evaluate --run=$SCRATCH/damaged_run --smoke                                 | damaged_run
visualize --run=$RUN                                                        | --out
visualize --run=$RUN --out=$NEW.png                                         | .gif
visualize --run=$RUN --out=$NEW                                             | .gif
visualize --run=$RUN --out=$NEW.gif --fps=nan                               | --fps
visualize --run=$RUN --out=$NEW.gif --fps=0                                 | --fps
visualize --run=$RUN --out=$NEW.gif --fps=inf                               | --fps
visualize --run=$RUN --out=$NEW.gif --height=3                              | --height
visualize --run=$RUN --out=$NEW.gif --height=999999                         | --height
visualize --run=$RUN --out=$NEW.gif --episodes=0                            | --episodes
visualize --run=$RUN --out=$NEW.gif --steps=0                               | --steps
visualize --run=$RUN --out=$NEW.gif --seed_index=9                          | --seed_index=9
visualize --run=$RUN --out=$NEW.gif --seed_index=-1                         | --seed_index=-1
visualize --run=$RUN --out=$NEW.gif --set=gravity                           | gravity
visualize --run=$RUN --out=$NEW.gif --set=gravty=3                          | gravty
visualize --run=$RUN --out=$NEW.gif --eval_seed=-1                          | --eval_seed
visualize --run=$RUN --figure=$NEW.png                                      | $RUN
visualize --run=$SCRATCH/nothing --out=$NEW.gif                             | nothing
visualize --run=$RUN --out=$NEW/x/y.gif                                     | $NEW
compare                                                                     | --runs
compare --runs=                                                             | --runs
compare --runs=$RUN,$SCRATCH/nothing                                        | nothing
compare --runs=$RUN --at=ten                                                | ten
compare --runs=$RUN --at=-3                                                 | -3
compare --runs=$RUN --column=retrun                                         | return
compare --runs=$RUN,$SCRATCH/header_run                                     | metrics.csv
compare --runs=$RUN,$SCRATCH/blank_run                                      | metrics.csv
compare --runs=$RUN,$SCRATCH/text_run                                       | metrics.csv
compare --runs=$RUN,$SCRATCH/ragged_run                                     | metrics.csv
compare --runs=$RUN,$SCRATCH/doubled_run                                    | metrics.csv
compare --runs=$RUN,$SCRATCH/bytes_metrics_run                              | metrics.csv
compare --runs=$RUN,$SCRATCH/one_seed_run                                   | one_seed_run
tournament                                                                  | --players
tournament --players=random,$RUN                                            | gymnax/CartPole-v1
tournament --players=random,greedy                                          | run
tournament --players=$RUN                                                   | --players
tournament --players=random,$RUN --games=3                                  | --games=3
tournament --players=random,$RUN --opening=-1                               | --opening=-1
tournament --players=random,$SCRATCH/nothing                                | nothing
tournament --players=random,$RUN --picture=$NEW/x/y.png                     | $NEW
adaptation --runs=$RUN                                                      | --runs
adaptation --runs=$RUN,$RUN                                                 | $RUN
adaptation --runs=$RUN,$SCRATCH/nothing                                     | env_kwargs
adaptation --runs=                                                          | --runs
report --run=$SCRATCH/nothing                                               | nothing
report --run=$SCRATCH                                                       | summary.json
report --name=x                                                             | --run
report --run=$RUN --name=x                                                  | provenance.json
report --run=$SCRATCH/half_summary_run                                      | summary.json
report --run=$SCRATCH/list_summary_run                                      | summary.json
fork                                                                        | my_idea
fork ppo                                                                    | my_idea
fork nothing zz                                                             | nothing
fork ../core/ekf zz                                                         | ../core/ekf
fork ppo ../zz                                                              | ../zz
fork ppo class                                                              | class
fork ppo ippo                                                               | exists
fork ppo 1zz                                                                | 1zz
fork --diff=ppo                                                             | ppo
fork --diff=nothing                                                         | nothing
collect $POLE --config.collect.episodes=0                                   | collect.episodes
collect $POLE --config.collect.num_envs=0                                   | collect.num_envs
collect $POLE --config.collect.action_noise=-1                              | action_noise
collect $POLE --config.collect.action_noise=nan                             | action_noise
collect $POLE --config.collect.env_kwargs.spred=2                           | spread
collect $POLE --config.collect.lr=3                                         | lr
collect $POLE --run=$SCRATCH/nothing                                        | nothing
collect $POLE --run=$RUN                                                    | gymnax/CartPole-v1
collect $POLE --seed=-1                                                     | --seed
collect $POLE --minari=x                                                    | inari
collect $PPO                                                                | collect
pretrain $PPO                                                               | pretrain
pretrain $POLE                                                              | data.npz
pretrain $POLE --data=$SCRATCH/strings.npz                                  | strings.npz
pretrain $POLE --data=$SCRATCH/good.npz --config.pretrain.updates=-5        | updates
pretrain $POLE --data=$SCRATCH/good.npz --config.pretrain.lr=0              | lr
pretrain $POLE --data=$SCRATCH/good.npz --config.pretrain.batch_size=0      | batch_size
pretrain $POLE --data=$SCRATCH/good.npz --num_seeds=0                       | --num_seeds=0
finetune $PPO                                                               | pretrained
finetune $POLE                                                              | model.npz
finetune --config=configs/icem_online_linear.py --workdir=$SCRATCH/staged   | model.npz
"""

CONFIG, CLI, DATASET, INTERFACE = "core/config.py", "launchers/cli.py", "core/dataset.py", "core/envs/interface.py"
RANGES, ROW = "test_a_config_is_compared_with_what_was_declared", "test_a_mistake_is_one_line_and_leaves_nothing"
PLANTED_ERRORS = {
    "a range is not looked at": (CONFIG, "not rule.holds(value)", "False", RANGES),
    "one entry is enough": (CONFIG, "all(map(holds, entries(value)))", "any(map(holds, entries(value)))", RANGES),
    "0 is positive": (CONFIG, "lambda x: x > 0", "lambda x: x >= 0", ROW),
    "2 is a fraction": (CONFIG, "0 <= x <= 1", "0 <= x", RANGES),
    "infinity is a number": (CONFIG, "if numbers := [x for x in entries(value) if isinstance(x, float) and not",
                             "if numbers := [x for x in entries(value) if isinstance(x, float) and 0 *", ROW),
    "a key may be missing": (CONFIG, "if name not in config]", "if False]", ROW),
    "smoke's keys are free": (CONFIG, 'name.removeprefix("smoke.")', "name", ROW),
    "any setting will do": (CONFIG, "if name not in defaults:", "if False:", ROW),
    "a setting of 0": (CONFIG, "value <= 0 < default", "value < 0 < default", ROW),
    "a config is not checked": (CLI, "    check(config, algorithm.get_config())\n", "", ROW),
    "a traceback is lost": (CLI, "    traceback.print_exception(error)\n", "",
                            "test_an_error_of_the_users_own_keeps_its_traceback_and_names_the_file"),
    "the outermost file is blamed": (CLI, "return own[-1] if own else None", "return own[0] if own else None",
                                     "test_an_error_of_a_launcher_names_the_innermost_file"),
    "false is true": (CLI, '"false": False', '"false": True', "test_settings_of_environments_by_flags"),
    "numbers that are not finite are data": (DATASET, "if not np.isfinite(value).all():", "if False:", ROW),
    "complex numbers are data": (DATASET, 'not in "biuf"', 'not in "biufc"', ROW),
    "an environment may lack what is needed": (INTERFACE, "if not hasattr(env.env, name)]", "if False]", ROW),
    "one agent, or several": (INTERFACE, "if (num_agents is not None) != agents:", "if False:", ROW),
    "two players who move in turn are one": (INTERFACE, '"alternates", False) and', '"turns", False) and', ROW),
    "the wrong number of agents is named": (INTERFACE,
        'lacks.append("several agents" if num_agents is not None', 'lacks.append("several agents" if agents', ROW),
    "nobody waits for the others": ("launchers/processes.py", "while len(waiting) < num_processes - 1:", "while False:",
                                    "test_processes_that_do_not_meet_say_so"),
}


def rows():
    for name, keys in NUMBERS.items():
        for key, values in keys.items():
            for value in values:
                typed = f"{key}={value}"
                culprit = CULPRITS.get(typed, key.rpartition(".")[2])
                yield "train", [f"--config={FILES[name]}", f"--config.{typed}"], culprit
    for line in TYPED.strip().splitlines():
        words, culprit = line.split(" | ")
        for name, file in FILES.items():
            words = words.replace(f"${name}", f"--config={file}")
        launcher, *args = shlex.split(words)
        yield launcher, args, culprit.strip()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """{name: folder} of what the rows name."""
    scratch, run = tmp_path_factory.mktemp("scratch"), tmp_path_factory.mktemp("runs") / "ppo"
    config = ppo.get_config()
    config.update(env_steps=64, eval_every=32, num_steps=8, num_envs=4, hidden_dims=(4,), eval_episodes=2)
    with jax.debug_key_reuse(False):
        train(config, num_seeds=2, workdir=str(run))
    damaged_runs(run, scratch)
    data_sets(scratch)
    for name, text in CONFIGS.items():
        (scratch / f"{name}.py").write_text(text)
    staged = scratch / "staged" / "pretrain"
    staged.mkdir(parents=True)
    np.savez(staged / "model.npz", **{"network/Dense_0/kernel": np.ones((6, 3), np.float32)})
    return dict(RUN=run, SCRATCH=scratch)


CONFIGS = dict(
    none="def get_config():\n    pass\n", dict="def get_config():\n    return dict(algorithm='ppo')\n",
    foreign="from algorithms import ppo\ndef get_config():\n    c = ppo.get_config()\n    c.algorithm = 'foreign'\n"
            "    return c\n",
    lacks="from algorithms import ppo\ndef get_config():\n    c = ppo.get_config()\n    del c.lr\n    return c\n",
    section="from algorithms import pets\ndef get_config():\n    c = pets.get_config()\n    del c['planner']\n"
            "    c.planner = 3\n    return c\n")


def damaged_runs(run, scratch):
    def copy(name, file, change):
        shutil.copytree(run, scratch / name)
        path = scratch / name / file
        path.write_bytes(change(path.read_bytes()))

    def other(**changes):
        return lambda text: json.dumps(json.loads(text) | changes).encode()

    def without(name):
        return lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != name}).encode()

    for name, change in dict(
            pets_run=other(algorithm="pets"), list_run=lambda text: b"[1, 2]", half_run=lambda text: text[:40],
            bytes_run=lambda text: b'{"a": "\x80"}', unnamed_run=without("algorithm"), words_run=other(num_seeds="two"),
            negative_run=other(num_envs=-4), other_run=other(hidden_dims=[0])).items():
        copy(name, "config.json", change)
    for name, change in dict(
            header_run=lambda text: text.split(b"\n")[0] + b"\n", blank_run=lambda text: b"",
            text_run=lambda text: text.replace(b"\n3", b"\nx3", 1), ragged_run=lambda text: text[:-30],
            doubled_run=lambda text: text + text.split(b"\n")[-2] + b"\n",
            bytes_metrics_run=lambda text: text[:50] + b"\xff\xfe" + text[50:],
            one_seed_run=lambda text: b"\n".join(line for i, line in enumerate(text.split(b"\n")) if i != 2 and i != 4)
            ).items():
        copy(name, "metrics.csv", change)
    copy("half_summary_run", "summary.json", lambda text: text[:40])
    copy("list_summary_run", "summary.json", lambda text: b"[1]")
    shutil.copytree(run, scratch / "damaged_run")
    for path in (scratch / "damaged_run" / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:300])


def data_sets(scratch):
    """Of cartpole_swingup: four episodes of 30 steps, and what can be wrong with them."""
    rng = np.random.default_rng(0)
    steps = dict(obs=rng.normal(size=(120, 4)), action=rng.normal(size=(120, 1)), next_obs=rng.normal(size=(120, 4)),
                 reward=rng.normal(size=120))
    good = {name: np.float32(x) for name, x in steps.items()}
    good |= dict(terminated=np.zeros(120, bool), truncated=np.arange(120) % 30 == 29)
    nan = good["obs"].copy()
    nan[7, 2] = np.nan
    one = np.zeros(120, bool)
    for name, changes in dict(
            good={}, strings=dict(obs=np.full((120, 4), "x")), complex=dict(obs=good["obs"] + 1j), nan=dict(obs=nan),
            scalar=dict(reward=np.float32(1)), terminated=dict(terminated=np.zeros((120, 3), bool)),
            lengths=dict(reward=good["reward"][:-1]), wide=dict(obs=np.zeros((120, 5), np.float32)),
            empty={name: x[:0] for name, x in good.items()}, one_episode=dict(truncated=one)).items():
        np.savez(scratch / f"{name}.npz", **good | changes)
    for name in ("terminated", "reward"):
        np.savez(scratch / f"no_{dict(terminated='end').get(name, name)}.npz", **{
            k: v for k, v in good.items() if k != name})
    counted = np.arange(120) % 2
    for name, action in dict(poles=counted, three=2 * counted, five=np.zeros((120, 2), np.float32)).items():
        np.savez(scratch / f"{name}.npz", **good | dict(action=action))
    np.savez(scratch / "pickle.npz", **good | dict(obs=np.array([{}], object)))
    (scratch / "text.npz").write_text("these are no arrays")
    (scratch / "half.npz").write_bytes((scratch / "good.npz").read_bytes()[:2000])


def run_program(launcher, args):
    """The exit status of a launcher as a program, in this process."""
    module = importlib.import_module(f"launchers.{launcher}")
    function = getattr(module, dict(evaluate="evaluate_run").get(launcher, launcher))
    before, argv = set(flags.FLAGS), sys.argv
    sys.argv = [f"{launcher}.py", *args]
    try:
        cli.run(function)
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = argv
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
        cli.REQUIRED.clear()
        sys.modules.pop("config_config", None)  # the file of --config


def files_below(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("launcher, args, culprit", [*rows()], ids=lambda value: " ".join(value) if isinstance(
    value, list) else None)
def test_a_mistake_is_one_line_and_leaves_nothing(launcher, args, culprit, places, tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no.netrc"))
    for name, folder in (places | dict(NEW=tmp_path / "new")).items():
        args = [arg.replace(f"${name}", str(folder)) for arg in args]
        culprit = culprit.replace(f"${name}", str(folder))
    if launcher in ("train", "collect", "pretrain", "finetune") and not any("--workdir" in arg for arg in args):
        args.append(f"--workdir={tmp_path / 'new'}")
    before = [files_below(folder) for folder in places.values()]
    with jax.debug_key_reuse(False):
        status = run_program(launcher, args)
    said = capfd.readouterr().err.strip().splitlines()
    assert status == 2 and len(said) == 1 and said[0].startswith("error: ") and culprit in said[0], "\n".join(said)
    assert [files_below(folder) for folder in places.values()] == before and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "algorithms").glob("[a-z]*.py")))
def test_every_number_of_a_method_has_a_range(name):
    """And its default lies in it. Settings of environments are checked by these."""
    declared = importlib.import_module(f"algorithms.{name}").get_config()
    check(declared, declared)
    numbers = {key for key, value in leaves(declared) if type(value) in (int, float)}
    assert not {key for key in numbers if not key.startswith(("env_kwargs.", "collect.env_kwargs.", "smoke."))}


LAUNCHERS = {"algorithm", "env", "env_kwargs", "eval_env_kwargs", "env_steps", "updates", "eval_every", "eval_episodes",
             "log_every", "smoke", "dataset", "collect", "pretrain", "num_envs", "num_steps"}  # what they read of it


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "algorithms").glob("[a-z]*.py")))
def test_every_key_of_a_config_is_read_by_its_file(name):
    text = (ROOT / "algorithms" / f"{name}.py").read_text()
    read = set(re.findall(r"config\.(\w+)", text))
    assert set(importlib.import_module(f"algorithms.{name}").get_config()) - LAUNCHERS <= read


def test_a_config_is_compared_with_what_was_declared():
    declared, config = ppo.get_config(), ppo.get_config()
    assert isinstance(dict(leaves(declared))["lr"], Checked) and config.lr == 2.5e-4  # as a number
    config.lr = 1  # an integer is a number
    config.hidden_dims = ()
    config.note = "another key"
    check(config, declared)
    pets = importlib.import_module("algorithms.pets").get_config()
    pets.kept_elites, pets.weight_decay = 0, 0.0  # nothing, where that is allowed
    check(pets, importlib.import_module("algorithms.pets").get_config())
    for key, value, words in (("lr", -1.0, "above 0"), ("discount", 1.5, "from 0 to 1"), ("num_envs", 0, "from 1 on"),
                              ("hidden_dims", (3, 0), "from 1 on"), ("env", "", None), ("note", "", None)):
        changed = ppo.get_config()
        changed.note = "other"
        changed[key] = value
        if words is None:
            check(changed, declared)
            continue
        with pytest.raises(UserError, match=f"{key} = .*{words}"):
            check(changed, declared)


def test_settings_of_environments_by_flags():
    """Those that the config does not list, of the type that was typed; and types of those that it does."""
    config = icem_online.get_config()
    for path, name, text in (("env_kwargs", "spread", "2"), ("env_kwargs", "jump_by", "(('log_gain', 0.5),)"),
                             ("eval_env_kwargs", "max_steps", "7"), ("collect.env_kwargs", "reveal", "false")):
        cli.apply_setting(config, path, name, text)
    assert config.env_kwargs.spread == 2 and config.env_kwargs.jump_by == (("log_gain", 0.5),)
    assert config.eval_env_kwargs.to_dict() == dict(max_steps=7) and config.collect.env_kwargs.reveal is False
    with pytest.raises(UserError, match="env_kwargs.reveal"):
        cli.apply_setting(config, "env_kwargs", "reveal", "perhaps")


BROKEN = "def get_config():\n    return 1 / 0\n", "import nothing_of_the_kind\n", "def get_config(:\n"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("text", BROKEN)
def test_an_error_of_the_users_own_keeps_its_traceback_and_names_the_file(text, tmp_path, capfd):
    (tmp_path / "mine.py").write_text(text)
    assert run_program("train", [f"--config={tmp_path / 'mine.py'}"]) == 1
    said = capfd.readouterr().err.strip().splitlines()
    assert "Traceback" in "".join(said) and "Error in" in said[-1] and "mine.py, line" in said[-1]


def test_an_error_of_a_launcher_names_the_innermost_file(capfd):
    def outer():
        len(3)  # line 1 of what is blamed

    def launch(*, smoke: bool = False):
        """Fails.

        Args:
            smoke: Nothing.
        """
        outer()

    before, argv = set(flags.FLAGS), sys.argv
    sys.argv = ["launch"]
    try:
        with pytest.raises(SystemExit):
            cli.run(launch)
    finally:
        sys.argv = argv
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
    line = outer.__code__.co_firstlineno + 1
    assert f"TypeError in {__file__}, line {line}: " in capfd.readouterr().err.splitlines()[-1]


def test_a_config_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli._from_here("--config=configs/ppo_cartpole.py") == f"--config={ROOT / 'configs/ppo_cartpole.py'}"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "ppo_cartpole.py").write_text("")
    assert cli._from_here("--config=configs/ppo_cartpole.py") == "--config=configs/ppo_cartpole.py"
    assert cli._from_here("--workdir=configs/ppo_cartpole.py") == "--workdir=configs/ppo_cartpole.py"


def test_processes_that_do_not_meet_say_so():
    """Of two, the first waits for the second, the second for the first; together they meet."""
    for process_id in (0, 1):
        with pytest.raises(UserError, match="did not meet"):
            processes.meet(f"127.0.0.1:{free_port()}", 2, process_id, patience=0.3)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
