// Comparing two sounds at a time without knowing which is which.

export class Blind {
  constructor(count) {
    this.wins = Array(count).fill(0);
    this.heard = Array(count).fill(0);
    this.ties = 0;
    this.rounds = 0;
    this.#deal();
  }

  // Those that were compared least meet next, in an order that nobody can foresee.
  #deal() {
    const places = this.heard.map((times, place) => [times + Math.random() * 0.9, place]);
    const [first, second] = places.sort((a, b) => a[0] - b[0]).map(([, place]) => place);
    this.pair = Math.random() < 0.5 ? [first, second] : [second, first];
  }

  vote(what) {
    const [a, b] = this.pair;
    this.heard[a]++;
    this.heard[b]++;
    this.rounds++;
    if (what === "tie") this.ties++;
    else this.wins[what === "a" ? a : b]++;
    this.#deal();
  }
}
