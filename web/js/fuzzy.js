// Fuzzy search in file names: letters in their order, and how well they stand together.

const STARTS = /[^a-z0-9]/;

/** How well `term` fits `text`, both in small letters; 0 where its letters are not all there in this order. */
function fit(term, text) {
    const whole = text.lastIndexOf(term);
    if (whole >= 0)
        return 100 + 10 * term.length + (whole === 0 || STARTS.test(text[whole - 1]) ? 20 : 0);
    let score = 0, run = 0, at = -1;
    for (const letter of term) {
        const next = text.indexOf(letter, at + 1);
        if (next < 0) return 0;
        run = next === at + 1 ? run + 1 : 0;
        score += 1 + run + (next === 0 || STARTS.test(text[next - 1]) ? 3 : 0);
        at = next;
    }
    return score;
}

/** The names that fit every word of `query`, best first; the file's own name counts more than its folders. */
export function search(query, names) {
    const terms = query.toLowerCase().split(/\s+/).filter(Boolean);
    const scored = [];
    for (const name of names) {
        const path = name.toLowerCase();
        const base = path.slice(path.lastIndexOf("/") + 1);
        let score = 0;
        for (const term of terms) {
            const own = fit(term, base);
            const best = Math.max(own && own + 15, fit(term, path));
            if (best === 0) { score = -1; break; }
            score += best;
        }
        if (score >= 0) scored.push([score - name.length / 1000, name]);
    }
    return scored.sort((a, b) => b[0] - a[0]).map(([, name]) => name);
}
