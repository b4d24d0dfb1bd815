// From a time chart to its traces: a stroke over it opens those of that time, a click those around it. A chart says in
// its layout's meta that it may be stroked ("opens") and, a heat map, which latency its height is ("of").
// Here and not on the server: to Streamlit a chart with newer data is another widget, so what is chosen on one that is
// being drawn again would be lost, and each would stay in the session's memory for as long as the page is open.
(() => {
  const KEPT = ["class", "arm", "version"]; // what the context bar filters by
  const LEAST_MS = 60_000; // around a click

  const instant = (x) => {
    // what Plotly says of a time axis is in UTC, and rarely says so
    const text = String(x).replace(" ", "T");
    return typeof x === "number" ? x : Date.parse(/T.*(Z|[+-]\d\d:\d\d)$/.test(text) || !text.includes("T") ? text : `${text}Z`);
  };
  const second = (ms) => new Date(ms).toISOString().slice(0, 19);

  const open = (meta, since, until, heights) => {
    const here = new URLSearchParams(location.search);
    const asked = new URLSearchParams(KEPT.filter((name) => here.get(name)).map((name) => [name, here.get(name)]));
    const first = Math.floor(since / 1e3) * 1e3; // whole seconds, at least one
    asked.set("from", second(first));
    asked.set("to", second(Math.max(Math.ceil(until / 1e3) * 1e3, first + 1e3)));
    if (meta.of && heights) {
      asked.set("of", meta.of);
      asked.set("min_ms", Math.floor(Math.min(...heights)));
      asked.set("max_ms", Math.ceil(Math.max(...heights)));
    }
    location.assign(`/${meta.opens}?${asked}`);
  };

  const hear = (chart) => {
    const meta = () => chart.layout?.meta ?? {};
    chart.on("plotly_selected", (event) => {
      if (!meta().opens || !event?.range) return;
      const ends = event.range.x.map(instant);
      open(meta(), Math.min(...ends), Math.max(...ends), event.range.y);
    });
    chart.on("plotly_click", (event) => {
      const point = event?.points?.[0];
      if (!meta().opens || !point) return;
      const [since, until] = chart.layout.xaxis.range.map(instant);
      const [at, around] = [instant(point.x), Math.max((until - since) / 180, LEAST_MS)];
      open(meta(), at - around, at + around, point.customdata);
    });
  };

  if (window.strokes) return; // a page that is drawn again brings this along again
  window.strokes = new MutationObserver(() => {
    for (const chart of document.querySelectorAll(".js-plotly-plot")) {
      if (chart._ev && chart.heard !== chart._ev) { // Plotly's emitter: another one where the chart was made anew
        chart.heard = chart._ev;
        hear(chart);
      }
    }
  });
  window.strokes.observe(document.body, { childList: true, subtree: true });
})();
