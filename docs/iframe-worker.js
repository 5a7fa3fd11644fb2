// A browser runs no worker of a page that was opened as a file: there the search's script runs in a hidden frame.
// By this file's name Material's plugin `offline` knows that it need not load one for the purpose from elsewhere.
"use strict";

if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.inside = frame.contentWindow;
      this.begun = new Promise(done => { frame.done = done; });
      frame.answer = data => this.dispatchEvent(new MessageEvent("message", {data}));
      this.inside.document.open();
      this.inside.document.write(`<script>postMessage = frameElement.answer;</script>
        <script src="${url}" onload="frameElement.done()"></script>`);
      this.inside.document.close();
    }

    postMessage(data) {
      this.begun.then(() => this.inside.dispatchEvent(new MessageEvent("message", {data})));
    }
  };
}
