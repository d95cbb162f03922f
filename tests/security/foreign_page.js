// What a page elsewhere can try against a server: `attack` returns everything it could read, as sentences.
async function attack(ours, targets) {
  const read = [];
  const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
  const within = (work, ms) => Promise.race([work, sleep(ms).then(() => Promise.reject(new Error("late")))]);

  async function tryFetch(path, options, how) {
    try {
      const stop = new AbortController();
      const answer = await within(fetch(ours + path, { ...options, signal: stop.signal }), 10000);
      if (answer.type !== "opaque" && answer.type !== "opaqueredirect") read.push(`${how} ${path}: ${answer.status}`);
      stop.abort();
    } catch (error) { /* refused, as it should be */ }
  }

  function form(path, type, fields) {
    const frame = document.createElement("iframe");
    frame.name = `f${Math.random()}`;
    document.body.append(frame);
    const made = document.createElement("form");
    Object.assign(made, { action: ours + path, method: "POST", enctype: type, target: frame.name });
    for (const [name, value] of Object.entries(fields)) {
      const field = document.createElement("input");
      Object.assign(field, { type: "hidden", name, value });
      made.append(field);
    }
    document.body.append(made);
    made.submit();
    setTimeout(() => { frame.remove(); made.remove(); }, 3000);
  }

  function element(tag, attribute, path) {
    return new Promise((done) => {
      const one = document.createElement(tag);
      one.onload = () => {
        let inside = null;
        try { inside = one.contentDocument && one.contentDocument.body.innerHTML; } catch (error) { /* foreign */ }
        if (inside) read.push(`${tag} ${path}: readable`);
        if (tag === "img" || tag === "script") read.push(`${tag} ${path}: loaded`);
        done();
      };
      one.onerror = () => done();
      one[attribute] = ours + path;
      document.body.append(one);
      setTimeout(() => { one.remove(); done(); }, 3000);
    });
  }

  async function one({ method, path, body }) {
    const text = body === null ? "" : JSON.stringify(body);
    if (method === "GET") {
      await tryFetch(path, { credentials: "include" }, "GET cors");
      await tryFetch(path, { mode: "no-cors", credentials: "include" }, "GET no-cors");
      await tryFetch(path, { headers: { "X-A": "1" } }, "GET preflight");
      await Promise.all([element("img", "src", path), element("script", "src", path), element("iframe", "src", path)]);
      return;
    }
    const types = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"];
    for (const type of types)
      await tryFetch(path, { method: "POST", mode: "no-cors", body: text, headers: { "Content-Type": type } }, type);
    await tryFetch(path, { method: "POST", mode: "no-cors" }, "empty");
    await tryFetch(path, { method: "POST", mode: "no-cors", body: new Blob([text]) }, "blob without type");
    await tryFetch(path, { method, body: text, headers: { "Content-Type": "application/json" } }, "json cors");
    await tryFetch(path, { method, body: text, credentials: "include" }, "cors");
    navigator.sendBeacon(ours + path, text);
    navigator.sendBeacon(ours + path, new URLSearchParams(body || {}));
    form(path, "application/x-www-form-urlencoded", {});
    form(path, "multipart/form-data", {});
    form(path, "text/plain", { [text.slice(0, -1) + ', "x": "']: '"}' });
  }

  for (let begin = 0; begin < targets.length; begin += 8)
    await Promise.all(targets.slice(begin, begin + 8).map(one));
  for (const path of ["/gradio_api/heartbeat/foreign00", "/gradio_api/queue/data?session_hash=foreign00"]) {
    await new Promise((done) => {
      const source = new EventSource(ours + path);
      source.onmessage = (event) => { read.push(`events ${path}: ${event.data}`); done(); };
      source.onerror = () => done();
      setTimeout(() => { source.close(); done(); }, 3000);
    });
  }
  await new Promise((done) => {
    const socket = new WebSocket(ours.replace("http", "ws") + "/gradio_api/queue/join");
    socket.onopen = () => { read.push("websocket opened"); done(); };
    socket.onerror = () => done();
  });
  await sleep(4000);
  return read;
}
