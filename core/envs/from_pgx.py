"""Board games of pgx for two players, by their names there.

Two players move in turn. With `opponent="self"` each step is a move of the player whose turn it is: obs is what this
player sees and reward what this player gets, so the value of the next obs counts against it. With another opponent the
steps are those of one player, the first or the second by chance, and the opponent answers within the step:

    random     any allowed move
    greedy     a move that wins at once where there is one, else any

obs is the board as this player sees it, flat, and then the A numbers that say which moves are allowed (`masked`). With
`reveal` it is a dictionary: this vector as "board", and "game", from which `move` goes on.
"""
import importlib

import jax
import jax.numpy as jnp

from core.config import check_settings
from core.envs.interface import Discrete, TimeStep
from core.errors import UserError

GAMES = {"tic_tac_toe": 9, "connect_four": 42}  # and the most moves that a game can have
SETTINGS = dict(opponent="self", reveal=False)


class Env:
    masked = True

    def __init__(self, name: str, /, **settings):
        try:
            pgx = importlib.import_module("pgx")
        except ImportError as error:
            raise UserError(f'"pgx/{name}" needs the extra `board`: pip install -e ".[board]"') from error
        if name not in GAMES:
            raise UserError(f'unknown environment "pgx/{name}"; did you mean one of pgx/{", pgx/".join(GAMES)}?')
        check_settings(f"pgx/{name}", settings, SETTINGS)
        settings = SETTINGS | settings
        self.opponent, self.reveal = settings["opponent"], settings["reveal"]
        if self.opponent not in OPPONENTS:
            raise UserError(f'opponent = "{self.opponent}" of "pgx/{name}": one of {", ".join(OPPONENTS)}')
        self.alternates = self.opponent == "self"
        self.env, self.max_steps = pgx.make(name), GAMES[name]
        self.action_space = Discrete(self.env.num_actions)

    def reset(self, key):
        start_key, answer_key = jax.random.split(key)
        game = self.env.init(start_key)  # which player moves first is drawn there
        if self.opponent != "self":
            game = jax.lax.cond(game.current_player == 0, lambda: game, lambda: self.answer(answer_key, game))
        return game, self.observe(game)

    def step(self, key, game, action):
        player = game.current_player
        game, reward, ended = self.move(game, action)
        if self.opponent != "self":
            game = jax.lax.cond(ended, lambda: game, lambda: self.answer(key, game))
            reward, ended = reward + jnp.where(ended, 0.0, game.rewards[player]), game.terminated
        obs = self.observe(game)
        return game, TimeStep(obs, obs, reward, ended, jnp.array(False), {})

    def move(self, game, action):
        """-> the game after it, the reward of the player who moves, whether it ended."""
        after = self.env.step(game, action)
        return after, after.rewards[game.current_player], after.terminated

    def answer(self, key, game):
        return self.env.step(game, OPPONENTS[self.opponent](self, key, game))

    def observe(self, game):
        board = jnp.concatenate([game.observation.ravel(), game.legal_action_mask]).astype(jnp.float32)
        return dict(board=board, game=game) if self.reveal else board


def any_move(env, key, game):
    return jax.random.categorical(key, jnp.log(game.legal_action_mask.astype(jnp.float32)))


def winning_move(env, key, game):
    moves = jnp.arange(env.action_space.n)
    reward = jax.vmap(lambda action: env.move(game, action)[1])(moves)
    wins = game.legal_action_mask & (reward > 0)
    good = jnp.where(wins.any(), wins, game.legal_action_mask)
    return jax.random.categorical(key, jnp.log(good.astype(jnp.float32)))


OPPONENTS = dict(self=None, random=any_move, greedy=winning_move)
